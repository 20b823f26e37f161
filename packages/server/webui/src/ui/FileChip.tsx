// SPDX-License-Identifier: MIT
// A text file of a question: its name and size; its text when it is chosen.

import { useMemo, useState } from "preact/hooks";
import { sizeOf } from "../chat/files.ts";
import type { TextFile } from "../chat/types.ts";
import { kibibytes, t } from "../i18n/index.ts";
import { Dialog } from "./Dialog.tsx";
import { Icon } from "./Icon.tsx";
import { LongText } from "./LongText.tsx";

export function FileChip({ file, onRemove }: { file: TextFile; onRemove?: () => void }) {
  const [isShown, setShown] = useState(false);
  const size = useMemo(() => sizeOf(file), [file]);
  return (
    <span class="file">
      <button type="button" class="file-name" aria-label={t.value.showFile(file.name)} onClick={() => setShown(true)}>
        <Icon name="attach" />
        <span class="file-title">{file.name}</span>
        <span class="faint small">{kibibytes(size)}</span>
      </button>
      {onRemove && (
        <button type="button" class="icon-button" aria-label={t.value.removeFile(file.name)} data-tip={t.value.removeFile(file.name)} onClick={onRemove}>
          <Icon name="close" />
        </button>
      )}
      {isShown && <Dialog title={file.name} wide onClose={() => setShown(false)}><LongText class="file-text" text={file.text} /></Dialog>}
    </span>
  );
}
