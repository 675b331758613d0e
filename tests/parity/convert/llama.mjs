// What llama.cpp makes of a GGUF, as JSON:
//     node llama.mjs FOLDER_OF_PACKAGES FILE.gguf probabilities '[1, 415, ...]'
//     node llama.mjs FOLDER_OF_PACKAGES FILE.gguf tokens '["a text", ...]'
import { pathToFileURL } from "node:url";

const [packages, modelPath, asked, given] = process.argv.slice(2);
const entry = `${packages}/node_modules/node-llama-cpp/dist/index.js`;
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry));
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
const vocabOnly = asked === "tokens";
const model = await llama.loadModel({ modelPath, vocabOnly });

// The probability of every id after each of these.
async function probabilities(ids) {
  const types = { experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32" };
  const context = await model.createContext({ contextSize: ids.length + 8, ...types });
  const all = { probabilities: true, options: { temperature: 1, topK: 0, topP: 1, minP: 0 } };
  const tokens = ids.map((id) => [id, { generateNext: all }]);
  const found = await context.getSequence().controlledEvaluate(tokens);
  return found.map(({ next }) => {
    const row = new Array(next.probabilities.size).fill(0);
    for (const [id, probability] of next.probabilities) row[id] = probability;
    return row;
  });
}

const value = JSON.parse(given);
const made = vocabOnly ? value.map((text) => model.tokenize(text)) : await probabilities(value);
process.stdout.write(`${JSON.stringify(made)}\n`);
await llama.dispose();
