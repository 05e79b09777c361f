// Run an ONNX model folder with transformers.js in a real headless Chromium, with nothing but localhost.
//
//   node generate.mjs MODEL_DIR DTYPE "PROMPT" N          greedy generation of up to N tokens
//   node generate.mjs --encode MODEL_DIR DTYPE "TEXT"     AutoModel: shape and first numbers of the first output
//
// The packages of package.json are looked for in the folder that PACK_TESTS_BROWSER names, else beside this file:
//   npm install --no-package-lock --ignore-scripts --omit=optional
// DTYPE is transformers.js' own name: fp32, fp16, q8, int8, uint8, q4, q4f16, bnb4, ...
// One line of JSON on stdout, exit status 0; on failure the browser's error on stderr and status 1.
// Chromium is $CHROMIUM, or else the first known name on PATH. Timeout: 120 s.
//
// There is no puppeteer: the page itself posts its result (or its error) back to the server below,
// so all that is needed of Chromium is that it opens one URL.
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import http from 'node:http';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const TIMEOUT_S = 120;
const HERE = path.dirname(fileURLToPath(import.meta.url));
const MODULES = path.join(process.env.PACK_TESTS_BROWSER || HERE, 'node_modules');

const args = process.argv.slice(2);
const encode = args[0] === '--encode';
if (encode) args.shift();
const [modelDir, dtype, text, count] = args;
const tokens = Number(count);
if (args.length !== (encode ? 3 : 4) || (!encode && !(Number.isInteger(tokens) && tokens > 0))) {
  console.error('usage: node generate.mjs MODEL_DIR DTYPE "PROMPT" N\n       node generate.mjs --encode MODEL_DIR DTYPE "TEXT"');
  process.exit(2);
}

// ---- what runs inside the browser (sent as source text: it sees nothing of this file but its arguments) ----
async function inPage(T, job) {
  const { env } = T;
  env.allowRemoteModels = false; // a missing file must be an error, not a download
  env.allowLocalModels = true; // off by default in browsers
  env.localModelPath = '/models/';
  env.useBrowserCache = false; // the profile is thrown away, so caching would only copy the weights once more
  env.backends.onnx.wasm.wasmPaths = '/ort/'; // the default is a CDN
  env.backends.onnx.wasm.numThreads = 1; // threads would need cross-origin isolation; one also keeps sums reproducible

  const options = { dtype: job.dtype, device: 'wasm' };
  const tokenizer = await T.AutoTokenizer.from_pretrained('model');
  const model = await (job.encode ? T.AutoModel : T.AutoModelForCausalLM).from_pretrained('model', options);
  // An unknown dtype does not fail in transformers.js: it silently becomes the device's default (q8 on wasm).
  for (const [name, session] of Object.entries(model.sessions)) {
    if (session.config.dtype !== job.dtype) throw new Error(`${name}: dtype ${job.dtype} is unknown, ${session.config.dtype} was loaded`);
  }

  const brands = (await navigator.userAgentData?.getHighEntropyValues(['fullVersionList']))?.fullVersionList ?? [];
  const versions = {
    'transformers.js': env.version,
    'onnxruntime-web': env.backends.onnx.versions.web,
    chromium: brands.find((b) => b.brand === 'Chromium')?.version ?? navigator.userAgent,
  };

  const inputs = await tokenizer(job.text);
  const prompt_tokens = Array.from(inputs.input_ids.data, Number);
  if (job.encode) {
    const outputs = await model(inputs);
    const output = Object.values(model.sessions)[0].outputNames[0];
    const { dims, data } = outputs[output];
    return { output, shape: dims, values: Array.from(data.slice(0, 8), Number), prompt_tokens, versions };
  }
  const sequences = await model.generate({ ...inputs, do_sample: false, max_new_tokens: job.tokens });
  const tokens = Array.from(sequences.data, Number).slice(prompt_tokens.length);
  return { text: tokenizer.decode(tokens, { skip_special_tokens: true }), tokens, prompt_tokens, versions };
}

// ONNX Runtime tells the reason of many failures only on the console, hence the log.
const page = (job) => `<!doctype html><meta charset="utf-8"><title>generate</title><script type="module">
const log = [];
for (const level of ['warn', 'error']) console[level] = (...a) => log.push(a.map(String).join(' '));
const post = (answer) => fetch('/result', { method: 'POST', body: JSON.stringify(answer) });
const fail = (e) => post({ error: String(e?.stack ?? e), log });
addEventListener('unhandledrejection', (event) => fail(event.reason));
try {
  await post({ result: await (${inPage})(await import('/transformers.js'), ${JSON.stringify(job).replaceAll('<', '\\u003c')}) });
} catch (e) { await fail(e); }
</script>`;

// ---- the server ----
const ROOTS = {
  '/ort/': path.join(MODULES, 'onnxruntime-web', 'dist'),
  '/models/model/': path.resolve(modelDir), // a fixed name: transformers.js wants it to look like a Hub id
};
const TYPES = { '.js': 'text/javascript', '.mjs': 'text/javascript', '.wasm': 'application/wasm', '.json': 'application/json' };

function locate(pathname) {
  // This bundle has onnxruntime-web's JavaScript inside, so the page needs no import map; only the .wasm is separate.
  if (pathname === '/transformers.js') return path.join(MODULES, '@huggingface', 'transformers', 'dist', 'transformers.js');
  for (const [prefix, root] of Object.entries(ROOTS)) {
    if (!pathname.startsWith(prefix)) continue;
    const file = path.join(root, decodeURIComponent(pathname.slice(prefix.length)));
    if (file.startsWith(root + path.sep)) return file; // nothing outside, whatever "..%2f" says
  }
}

function serveFile(request, response, pathname) {
  const file = locate(pathname);
  const stat = file && fs.statSync(file, { throwIfNoEntry: false });
  if (!stat?.isFile()) return response.writeHead(404).end();
  const headers = { 'content-type': TYPES[path.extname(file)] ?? 'application/octet-stream', 'content-length': stat.size };
  // No range requests: transformers.js makes those (for file sizes) to remote hosts only.
  response.writeHead(200, headers);
  if (request.method === 'HEAD') return response.end();
  fs.createReadStream(file).on('error', () => response.destroy()).pipe(response);
}

function findChromium() {
  if (process.env.CHROMIUM) return process.env.CHROMIUM;
  for (const name of ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome']) {
    for (const dir of (process.env.PATH ?? '').split(path.delimiter)) {
      if (dir && fs.existsSync(path.join(dir, name))) return path.join(dir, name);
    }
  }
  throw new Error('no Chromium: set CHROMIUM to its path');
}

let profile, browser, stderr = '';

function finish(status, message) {
  if (finish.done) return;
  finish.done = true;
  (status === 0 ? process.stdout : process.stderr).write(message + '\n', () => {
    // The browser leads its own process group, so this ends its helper processes as well, and no other Chromium.
    try { if (browser?.pid) process.kill(-browser.pid, 'SIGKILL'); } catch { /* it is gone already */ }
    // Helper processes can still be writing while they die, hence the retries.
    try {
      if (profile) fs.rmSync(profile, { recursive: true, force: true, maxRetries: 10, retryDelay: 100 });
    } catch { /* a temporary folder left behind is no reason to fail */ }
    process.exit(status);
  });
}
process.on('SIGINT', () => finish(130, 'interrupted')).on('SIGTERM', () => finish(143, 'terminated'));
process.on('uncaughtException', (e) => finish(1, String(e.stack)));

const server = http.createServer((request, response) => {
  const { pathname } = new URL(request.url, 'http://localhost');
  if (process.env.VERBOSE) console.error(request.method, pathname);
  if (request.method === 'POST' && pathname === '/result') {
    const chunks = [];
    request.on('data', (chunk) => chunks.push(chunk)).on('end', () => {
      response.end();
      const { result, error, log } = JSON.parse(Buffer.concat(chunks).toString());
      if (result) finish(0, JSON.stringify(result));
      else finish(1, [error, ...log].join('\n'));
    });
  } else if (pathname === '/') {
    response.setHeader('content-type', 'text/html');
    response.end(page({ encode, dtype, text, tokens }));
  } else {
    serveFile(request, response, pathname);
  }
});

server.listen(0, '127.0.0.1', () => {
  profile = fs.mkdtempSync(path.join(os.tmpdir(), 'generate-'));
  browser = spawn(findChromium(), [
    '--headless=new',
    `--user-data-dir=${profile}`,
    ...(process.getuid?.() === 0 ? ['--no-sandbox'] : []), // Chromium refuses to run as root with its sandbox
    '--disable-gpu', // only the wasm backend is used
    '--disable-dev-shm-usage', // /dev/shm is small in containers
    '--no-first-run', '--disable-extensions', '--disable-breakpad',
    '--disable-background-networking', '--disable-component-update', '--disable-sync',
    '--no-proxy-server', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', // nothing may come from elsewhere
    `http://127.0.0.1:${server.address().port}/`,
  ], {
    detached: true,
    stdio: ['ignore', 'ignore', 'pipe'],
    env: { ...process.env, TMPDIR: profile }, // so that what a killed Chromium leaves behind goes with the profile
  });
  browser.stderr.on('data', (chunk) => { stderr = (stderr + chunk).slice(-4000); });
  browser.on('error', (e) => finish(1, `cannot start Chromium: ${e.message}`));
  browser.on('exit', (code, signal) => finish(1, `Chromium ended early (${signal ?? code})\n${stderr}`));
});
setTimeout(() => finish(1, `no answer from the page within ${TIMEOUT_S} s\n${stderr}`), TIMEOUT_S * 1000);
