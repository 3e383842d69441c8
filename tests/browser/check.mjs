// Opens pages in headless Chromium as a reader would, and fails if one of them is not as it should be.
//
//     cd tests/browser && npm install && npm run check -- SHOTS PAGE.html ...
//
// On a desk and on a phone, in light and in dark: no finding of axe-core that is serious or critical, no sideways
// scrolling, no request to a network, no error or breach of the page's own policy in the console; the slider, if there
// is one, moves the images. Screenshots go to the folder SHOTS.
import chromium from "@sparticuz/chromium";
import axe from "axe-core";
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

const SCREENS = { desk: [1200, 900], phone: [390, 844] };

const [shots, ...pages] = process.argv.slice(2);
if (!pages.length) {
  console.error("usage: npm run check -- SHOTS PAGE.html ...");
  process.exit(2);
}
fs.mkdirSync(shots, { recursive: true });
const browser = await puppeteer.launch({
  args: [...chromium.args, "--no-sandbox"],
  executablePath: await chromium.executablePath(),
  headless: "shell",
});
let failed = false;
for (const page of pages) {
  const name = path.basename(page, ".html");
  console.log(`${page}: ${(fs.statSync(page).size / 1024).toFixed(0)} KB`);
  for (const screen of Object.keys(SCREENS)) {
    for (const mode of ["light", "dark"]) {
      const { minor, faults } = await look(page, screen, mode, path.join(shots, `${name}-${screen}-${mode}.png`));
      failed ||= faults.length > 0;
      console.log(`  ${screen}, ${mode}: ${faults.join("; ") || "nothing serious"}; ${minor} minor or moderate`);
    }
  }
}
await browser.close();
process.exit(failed ? 1 : 0);

async function look(page, screen, mode, shot) {
  const tab = await browser.newPage();
  const faults = [];
  tab.on("console", (message) => message.type() === "error" && faults.push(`console: ${message.text()}`));
  tab.on("pageerror", (error) => faults.push(`script: ${error.message}`));
  tab.on("request", (request) => {
    if (!/^(file|data):/.test(request.url())) faults.push(`request: ${request.url()}`);
  });
  const [width, height] = SCREENS[screen];
  await tab.setViewport({ width, height });
  await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: mode }]);
  await tab.goto(pathToFileURL(page).href);
  await tab.screenshot({ path: shot, fullPage: true });
  if (!(await sliderMoves(tab))) faults.push("the slider moves nothing");
  // What is folded is read as well.
  await tab.evaluate(() => document.querySelectorAll("details").forEach((part) => (part.open = true)));
  const overflow = await tab.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  if (overflow > 0) faults.push(`${overflow} px wider than the screen`);
  await tab.evaluate(axe.source);
  const { violations } = await tab.evaluate(() => window.axe.run());
  const serious = violations.filter((one) => ["serious", "critical"].includes(one.impact));
  faults.push(...serious.map((one) => `${one.impact} ${one.id}: ${one.nodes[0].html.slice(0, 160)}`));
  await tab.close();
  return { minor: violations.length - serious.length, faults };
}

// Whether the arrow key changes what shows; true without a slider.
async function sliderMoves(tab) {
  const shown = () => tab.$$eval("[data-at]:not([hidden])", (parts) => parts.map((part) => part.dataset.at));
  if (!(await tab.$("#slider"))) return true;
  const before = await shown();
  await tab.focus("#slider");
  await tab.keyboard.press("ArrowLeft");
  const after = await shown();
  return before.length > 1 && after.length === before.length && after.every((at) => Number(at) === before[0] - 1);
}
