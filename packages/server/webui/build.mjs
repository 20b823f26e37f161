// SPDX-License-Identifier: MIT
// Builds the bundle into ../src/candle_vllm/server/static. `--check` builds elsewhere and compares.
//
// The same source and the same tool versions give the same bytes: names carry a hash of the content, and nothing
// of the machine or the time goes in.
import { createHash } from "node:crypto";
import { cp, mkdtemp, mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const here = fileURLToPath(new URL(".", import.meta.url));
const target = join(here, "../src/candle_vllm/server/static");
const MAX_GZIPPED = 150 * 1024;

async function bundle(folder) {
  await mkdir(join(folder, "assets"), { recursive: true });
  const made = await build({
    absWorkingDir: here,
    entryPoints: { app: "src/main.tsx", style: "src/styles/index.css" },
    outdir: join(folder, "assets"),
    entryNames: "[name]-[hash]",
    chunkNames: "[name]-[hash]",
    bundle: true,
    splitting: true,
    format: "esm",
    target: ["chrome123", "firefox125", "safari17.5"],
    minify: true,
    legalComments: "none",
    charset: "utf8",
    jsx: "automatic",
    jsxImportSource: "preact",
    metafile: true,
    logLevel: "warning",
  });
  const outputs = Object.entries(made.metafile.outputs);
  const named = (entry) => basename(outputs.find(([, output]) => output.entryPoint === entry)[0]);
  const template = await readFile(join(here, "index.html"), "utf8");
  const page = template
    .replace("%APP%", `assets/${named("src/main.tsx")}`)
    .replace("%STYLE%", `assets/${named("src/styles/index.css")}`);
  await writeFile(join(folder, "index.html"), page);
  for (const name of ["icon.svg", "preview.html"]) await cp(join(here, name), join(folder, name));
  await writeFile(join(folder, "licenses.txt"), await licenses());
  await writeFile(join(folder, "manifest.json"), JSON.stringify(await manifest(folder), null, 2) + "\n");
}

async function licenses() {
  const { dependencies } = JSON.parse(await readFile(join(here, "package.json"), "utf8"));
  const texts = [];
  for (const name of Object.keys(dependencies).sort()) {
    const folder = join(here, "node_modules", name);
    const file = (await readdir(folder)).find((one) => /^licen[cs]e/i.test(one));
    const { version, license } = JSON.parse(await readFile(join(folder, "package.json"), "utf8"));
    const text = file ? (await readFile(join(folder, file), "utf8")).replaceAll("\r\n", "\n").trim() : license;
    texts.push(`${name} ${version}\n\n${text}\n`);
  }
  return `The web UI contains these libraries.\n\n${texts.join(`\n${"-".repeat(80)}\n\n`)}`;
}

async function manifest(folder) {
  const names = ["index.html", "icon.svg", "licenses.txt", "preview.html"];
  for (const name of (await readdir(join(folder, "assets"))).sort()) names.push(`assets/${name}`);
  const files = {};
  for (const name of names) {
    const data = await readFile(join(folder, name));
    files[name] = { sha256: createHash("sha256").update(data).digest("hex"), bytes: data.length };
  }
  return { files };
}

async function sizes(folder) {
  const { files } = JSON.parse(await readFile(join(folder, "manifest.json"), "utf8"));
  let total = 0;
  for (const name of Object.keys(files)) {
    if (name === "licenses.txt") continue; // read by people, never loaded by the page
    const size = gzipSync(await readFile(join(folder, name)), { level: 9 }).length;
    total += size;
    console.log(`${String(size).padStart(7)}  ${name}`);
  }
  console.log(`${String(total).padStart(7)}  bytes gzipped in all, of ${MAX_GZIPPED}`);
  if (total > MAX_GZIPPED) throw new Error("the bundle is larger than it may be");
}

async function listing(folder) {
  const found = await readdir(folder, { recursive: true, withFileTypes: true });
  return found.filter((one) => one.isFile()).map((one) => join(one.parentPath ?? one.path, one.name).slice(folder.length + 1)).sort();
}

async function compare(built) {
  const [wanted, there] = [await listing(built), await listing(target)];
  const differing = [];
  for (const name of new Set([...wanted, ...there])) {
    const same =
      wanted.includes(name) &&
      there.includes(name) &&
      (await readFile(join(built, name))).equals(await readFile(join(target, name)));
    if (!same) differing.push(name);
  }
  if (differing.length) throw new Error(`static/ is not what the source builds (npm run build): ${differing.join(", ")}`);
}

const work = await mkdtemp(join(tmpdir(), "candle-vllm-webui-"));
try {
  await bundle(work);
  await sizes(work);
  if (process.argv.includes("--check")) {
    await compare(work);
  } else {
    await rm(target, { recursive: true, force: true });
    await mkdir(target); // as every folder is made, where the one in work is for its owner alone
    await cp(work, target, { recursive: true });
  }
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
} finally {
  await rm(work, { recursive: true, force: true });
}
