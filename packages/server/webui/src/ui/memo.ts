// SPDX-License-Identifier: MIT
// A component that is drawn again only where its properties say so (preact/compat's memo, without the rest of it).

import { type ComponentType, type FunctionComponent, Component, createElement } from "preact";

export function memo<P extends object>(
  view: FunctionComponent<P>,
  same: (before: P, after: P) => boolean,
): ComponentType<P> {
  return class extends Component<P> {
    override shouldComponentUpdate(next: P): boolean {
      return !same(this.props, next);
    }

    override render() {
      return createElement(view, this.props);
    }
  };
}
