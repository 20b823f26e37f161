// SPDX-License-Identifier: MIT
// The page's icons: lines on a grid of 24.

const PATHS = {
  plus: "M12 5v14M5 12h14",
  search: "M11 18a7 7 0 1 0 0-14 7 7 0 0 0 0 14zM20 20l-4-4",
  menu: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10 11v5M14 11v5",
  refresh: "M20 11a8 8 0 1 0-2.300 6M20 5v6h-6",
  play: "M8 5l11 7-11 7z",
  stop: "M7 7h10v10H7z",
  send: "M12 19V5M6 11l6-6 6 6",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  down: "M6 9.5l6 6 6-6",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  box: "M12 3l8 4.500v9L12 21l-8-4.500v-9zM4 7.500l8 4.500 8-4.500M12 12v9",
  tool: "M14.5 6.5a4.5 4.5 0 0 1 5.5-1l-3 3 .5 2 2 .5 3-3a4.5 4.5 0 0 1-6 5.5L9 21l-3.5-3.5 7.5-7.5a4.5 4.5 0 0 1 1.5-3.5z",
  warning: "M12 4l9 16H3zM12 10v4M12 17h.01",
  info: "M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18zM12 11v5M12 8h.01",
  sidebar: "M4 5h16v14H4zM10 5v14",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  keyboard: "M3 6h18v12H3zM7 10h.01M11 10h.01M15 10h.01M17 10h.01M8 14h8",
  power: "M12 4v8M7 7a7 7 0 1 0 10 0",
  eye: "M2.500 12s3.500-6 9.500-6 9.500 6 9.500 6-3.500 6-9.500 6-9.500-6-9.500-6zM12 14.500a2.500 2.500 0 1 0 0-5 2.500 2.500 0 0 0 0 5z",
  code: "M9 7l-5 5 5 5M15 7l5 5-5 5",
  prompt: "M5 5h14v11h-8l-4 4v-4H5zM8.500 9h7M8.500 12h4",
  pin: "M9 4h6l-1 6 3 3v2H7v-2l3-3zM12 15v6",
  folder: "M3 6h6l2 2h10v11H3z",
  folderPlus: "M3 6h6l2 2h10v11H3zM12 11v5M9.500 13.500h5",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  attach: "M20 11.500l-8 8a5 5 0 0 1-7-7l8.500-8.500a3.300 3.300 0 0 1 4.700 4.700l-8.500 8.500a1.700 1.700 0 0 1-2.400-2.400l7.500-7.500",
  chart: "M4 19h16M7 15l3-4 3 2 4-6",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false">
      <path d={PATHS[name]} />
    </svg>
  );
}
