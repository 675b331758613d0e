// Decodes greedily by llama.cpp. Once the model is loaded it answers each line of JSON by one:
//     node llama_cpp.mjs FOLDER_OF_PACKAGES FILE.gguf THREADS
//     {"prompts": [[1, 415], ...], "room": 64}   reads prompts: the first id of each
//     {"tokens": 16}                             decodes: the next ids of each
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [packages, modelPath, threads] = process.argv.slice(2);
const entry = `${packages}/node_modules/node-llama-cpp/dist/index.js`;
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry));
const llama = await getLlama({
  gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: Number(threads),
});
const model = await llama.loadModel({ modelPath });
process.stdout.write("[]\n");
let context, rows;

async function start({ prompts, room }) {
  await context?.dispose();
  const sequences = prompts.length;
  const contextSize = prompts[0].length + room + 8;
  context = await model.createContext({ sequences, contextSize, threads: Number(threads) });
  rows = prompts.map((ids) => context.getSequence().evaluate(ids, { temperature: 0 }));
}

// The next ids of a row; others decode meanwhile, and what is asked for at once is one batch.
async function take(row, n) {
  const ids = [];
  while (ids.length < n) {
    const { value, done } = await row.next();
    if (done) break;
    ids.push(value);
  }
  return ids;
}

for await (const line of createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line);
  if (asked.prompts) await start(asked);
  const made = await Promise.all(rows.map((row) => take(row, asked.tokens ?? 1)));
  process.stdout.write(`${JSON.stringify(made)}\n`);
}
