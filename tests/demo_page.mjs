// Uses the demo's page as a visitor would: node demo_page.mjs URL FOLDER IMAGE BROKEN_IMAGE, in a folder with
// puppeteer-core and @sparticuz/chromium. Prints what it saw as JSON; screenshots go to FOLDER.
import { createRequire } from 'node:module';
import { join } from 'node:path';
const require = createRequire(join(process.cwd(), 'index.js'));
const chromium = require('@sparticuz/chromium').default ?? require('@sparticuz/chromium');
const puppeteer = require('puppeteer-core').default ?? require('puppeteer-core');

const [url, folder, image, broken] = process.argv.slice(2);
const browser = await puppeteer.launch({
  args: [...chromium.args, '--no-sandbox'], executablePath: await chromium.executablePath(), headless: 'shell', protocolTimeout: 500_000,
});
const page = await browser.newPage();
const seen = { requests: [], errors: [] };
page.setDefaultTimeout(400_000);
page.on('request', (request) => seen.requests.push(request.url()));
page.on('pageerror', (error) => seen.errors.push(String(error)));
const shot = (name) => page.screenshot({ path: join(folder, `${name}.png`), fullPage: true });
const texts = (selector) => page.$$eval(selector, (found) => found.map((one) => one.textContent.trim()));
const ready = async () => { // buttons are there some time before they do anything
  await page.waitForSelector('#generate');
  await page.waitForNetworkIdle({ idleTime: 2000 });
};
const toast = async () => {
  await page.waitForSelector('.toast-body');
  const text = (await texts('.toast-body'))[0];
  await page.click('.toast-close');
  await page.waitForFunction(() => !document.querySelector('.toast-body'));
  return text;
};
const tab = async (name) => {
  for (const one of await page.$$('button[role=tab]')) {
    if ((await one.evaluate((node) => node.textContent.trim())) === name) { await one.click(); break; }
  }
};

await page.setViewport({ width: 1280, height: 900 });
await page.goto(url, { waitUntil: 'domcontentloaded' });
await ready();
await page.click('#generate');
await page.waitForFunction(() => document.querySelectorAll('#tuned img').length >= 2);
await page.waitForFunction(() => document.querySelectorAll('#scores td').length >= 4);
seen.images = {};
for (const name of ['base', 'tuned']) seen.images[name] = await page.$$eval(`#${name} img`, (found) => found.length);
seen.captions = await texts('#tuned .caption-label');
seen.table = await texts('#scores tbody td'); // rows in sight alone
await shot('generated');
await page.$eval('#prompt textarea', (node) => { node.value = ''; node.dispatchEvent(new Event('input', { bubbles: true })); });
await page.click('#generate');
seen.empty = await toast();

await tab('Score images');
await page.waitForSelector('#about textarea', { visible: true });
await page.type('#about textarea', 'a large red circle');
await page.click('#score');
seen.nothing = await toast();
const upload = async (path) => { // again, if the page was not ready for it
  const [stem] = path.split('/').pop().split('.');
  for (let tries = 0; tries < 5; tries++) {
    await (await page.waitForSelector('#upload input[type=file]')).uploadFile(path);
    const shown = page.waitForFunction((name) => document.querySelector('#upload').textContent.includes(name), { timeout: 15_000 }, stem);
    if (await shown.then(() => true, () => false)) return;
  }
  throw new Error(`${path} was not taken`);
};
await upload(image);
await page.click('#score');
await page.waitForFunction(() => document.querySelectorAll('#ranked img').length >= 1);
seen.ranked = await texts('#ranked .caption-label');
await shot('scored');
await page.reload({ waitUntil: 'domcontentloaded' });
await ready();
await tab('Score images');
await page.waitForSelector('#about textarea', { visible: true });
await page.type('#about textarea', 'a large red circle');
await upload(broken);
await page.click('#score');
await page.waitForSelector('.toast-body');
await shot('error');
seen.broken = await toast();

await page.setViewport({ width: 390, height: 844 });
await page.reload({ waitUntil: 'domcontentloaded' });
await ready();
await page.click('#generate');
await page.waitForFunction(() => document.querySelectorAll('#scores td').length >= 4);
seen.width = await page.evaluate(() => document.documentElement.scrollWidth);
await shot('phone');
await browser.close();
console.log(JSON.stringify(seen));
