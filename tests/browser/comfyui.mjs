// ComfyUI's page in a browser of its own, for the scripts beside this file.
//
// Needs the package playwright-core (NODE_PATH names the node_modules that holds it) and a Chromium: CHROMIUM names its
// file, else it is looked for on PATH.

import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const FLAGS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const START = 120_000; // ms
const RUN = 600_000;

const found = () => execFileSync("sh", ["-c", "command -v chromium || command -v chromium-browser || command -v google-chrome"]).toString().trim();

/** Opens the page at `url` and calls use(comfy); the browser ends with it, whatever happens. */
export async function withComfyUI(url, use, { width = 1600, height = 1000 } = {}) {
  const folder = mkdtempSync(join(tmpdir(), "trilora-browser-"));
  const context = await chromium.launchPersistentContext(folder, {
    executablePath: process.env.CHROMIUM || found(), args: FLAGS, viewport: { width, height }, acceptDownloads: false,
  });
  try {
    const page = context.pages()[0] ?? (await context.newPage());
    const faults = [];
    page.on("pageerror", (error) => faults.push(String(error)));
    await page.goto(url);
    await page.waitForFunction(() => window.app?.graph && window.app.extensionManager, null, { timeout: START });
    await page.waitForTimeout(1000);
    await page.keyboard.press("Escape");
    return await use(new Comfy(page, faults));
  } finally {
    await context.close();
    rmSync(folder, { recursive: true, force: true });
  }
}

class Comfy {
  constructor(page, faults) {
    this.page = page;
    this.faults = faults; // errors of scripts that nobody caught
  }

  /** Opens a workflow as if it were dropped on the page; it may be in API format. */
  async load(workflow) {
    await this.page.evaluate((graph) => (graph.nodes ? window.app.loadGraphData(graph) : window.app.loadApiJson(graph, "workflow")), workflow);
    await this.page.waitForTimeout(1000);
  }

  /** Queues what is open and waits for its end; throws what the server says of a failure. */
  async run() {
    const said = await this.page.evaluate(async (limit) => {
      const { app } = window;
      const over = new Promise((resolve) => {
        app.api.addEventListener("execution_success", () => resolve(""), { once: true });
        for (const kind of ["execution_error", "execution_interrupted"]) app.api.addEventListener(kind, ({ detail }) => resolve(`${kind}: ${detail?.node_type}: ${detail?.exception_message}`), { once: true });
        setTimeout(() => resolve("no end in time"), limit);
      });
      await app.queuePrompt(0);
      if (Object.keys(app.lastNodeErrors ?? {}).length) return JSON.stringify(app.lastNodeErrors);
      return over;
    }, RUN);
    if (said) throw new Error(said);
    await this.page.waitForTimeout(700);
  }

  /** What the front end would write into a file now. */
  saved() {
    return this.page.evaluate(() => JSON.parse(JSON.stringify(window.app.graph.serialize())));
  }

  /** Node id -> {type, values: widget name -> value} of what is on the canvas. */
  values() {
    return this.page.evaluate(() => Object.fromEntries(window.app.graph.nodes.map((node) => [node.id, {
      type: node.type,
      values: Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, typeof widget.value === "object" ? null : widget.value])),
    }])));
  }

  /** Shows all nodes, or one, and takes a picture where it has a path. */
  async picture(path, id) {
    await this.page.evaluate(async (wanted) => {
      const { canvas, graph } = window.app;
      const node = wanted === undefined ? null : graph.getNodeById(wanted);
      canvas.selectItems?.(node ? [node] : graph.nodes);
      await window.app.extensionManager.command.execute("Comfy.Canvas.FitView");
      canvas.deselectAll?.();
      canvas.draw(true, true);
    }, id);
    await this.page.waitForTimeout(900);
    if (path) await this.page.screenshot({ path });
  }
}

/** The JSON that a script gets on its standard input. */
export async function request() {
  let text = "";
  for await (const part of process.stdin) text += part;
  return JSON.parse(text);
}
