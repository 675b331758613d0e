// OpenAI's client for JavaScript against a live server: node openai_client.mjs PACKAGES URL
//
// PACKAGES is a folder in which `npm install openai` was run. Prints "ok" for each thing that holds.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { setTimeout as sleep } from "node:timers/promises";

const [packages, url] = process.argv.slice(2);
const { default: OpenAI, NotFoundError, BadRequestError } = createRequire(`${packages}/`)("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });

const messages = [{ role: "user", content: "Hello" }];
const asked = { model: "tiny", messages, max_tokens: 12, seed: 1 };
const parameters = {
  type: "object",
  properties: { city: { enum: ["Paris", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};

const cases = {
  async "a chat answers"() {
    const answer = await client.chat.completions.create(asked);
    assert.equal(answer.choices[0].finish_reason, "length");
    assert.equal(answer.usage.completion_tokens, 12);
    assert.ok(answer.choices[0].message.content);
  },

  async "a stream says the same"() {
    const whole = await client.chat.completions.create(asked);
    const options = { stream: true, stream_options: { include_usage: true } };
    const stream = await client.chat.completions.create({ ...asked, ...options });
    let [text, usage] = ["", null];
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, 12);
    const helped = client.chat.completions.stream(asked);
    assert.equal(await helped.finalContent(), text);
  },

  async "a text is continued"() {
    const answer = await client.completions.create({ model: "tiny", prompt: "The cat", seed: 1 });
    assert.equal(answer.usage.completion_tokens, 16);
  },

  async "a tool is called, and its result is read"() {
    let called = 0;
    const weather = { name: "get_weather", parameters, function: () => `Rain ${++called}` };
    const tool = { type: "function", function: { ...weather, parse: JSON.parse } };
    const once = { ...asked, max_tokens: 80, tools: [tool] };
    const forced = { type: "function", function: { name: "get_weather" } };
    const runner = client.chat.completions.runTools({ ...once, tool_choice: forced });
    await runner.finalFunctionToolCallResult();
    await runner.done();
    const [, answer, result] = runner.messages;
    assert.equal(called, 1);
    assert.ok(["Paris", "Oslo"].includes(JSON.parse(answer.tool_calls[0].function.arguments).city));
    assert.deepEqual([result.role, result.content], ["tool", "Rain 1"]);
    assert.equal(result.tool_call_id, answer.tool_calls[0].id);
    const next = await client.chat.completions.create({ ...asked, messages: runner.messages });
    assert.equal(next.usage.completion_tokens, 12);
  },

  async "a tool is called in a stream"() {
    const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
    const more = { tools, tool_choice: "required", max_tokens: 80 };
    const stream = client.chat.completions.stream({ ...asked, ...more });
    const completion = await stream.finalChatCompletion();
    const [call] = completion.choices[0].message.tool_calls;
    assert.equal(completion.choices[0].finish_reason, "tool_calls");
    assert.equal(call.function.name, "get_weather");
    assert.ok(JSON.parse(call.function.arguments).city);
  },

  async "a schema is kept"() {
    const schema = { ...parameters, properties: { city: { const: "Oslo" } } };
    const response_format = { type: "json_schema", json_schema: { name: "x", schema, strict: true } };
    const answer = await client.chat.completions.parse({ ...asked, max_tokens: 60, response_format });
    assert.deepEqual(JSON.parse(answer.choices[0].message.content), { city: "Oslo" });
  },

  async "errors have a status, a code and a field"() {
    const other = client.chat.completions.create({ ...asked, model: "other" });
    await assert.rejects(other, (error) => {
      assert.ok(error instanceof NotFoundError);
      assert.deepEqual([error.status, error.code, error.param], [404, "model_not_found", "model"]);
      return true;
    });
    const long = client.chat.completions.create({ ...asked, max_tokens: 300, stream: true });
    await assert.rejects(long, (error) => {
      assert.ok(error instanceof BadRequestError);
      assert.equal(error.code, "context_length_exceeded");
      assert.equal(error.type, "invalid_request_error");
      return true;
    });
  },

  async "who aborts frees the row"() {
    const running = async () =>
      Number(/^lechat:num_requests_running(?:\{.*\})? (\S+)$/m.exec(await metrics())[1]);
    const metrics = async () => (await fetch(`${url}/metrics`)).text();
    const stream = await client.chat.completions.create({ ...asked, max_tokens: 240, stream: true });
    for await (const _ of stream) {
      stream.controller.abort();
    }
    const leaving = new AbortController();
    const whole = { ...asked, max_tokens: 240 };
    const left = client.chat.completions.create(whole, { signal: leaving.signal });
    setTimeout(() => leaving.abort(), 50);
    await assert.rejects(left, OpenAI.APIUserAbortError);
    for (let i = 0; (await running()) && i < 200; i++) {
      await sleep(50);
    }
    assert.equal(await running(), 0);
    assert.equal((await client.chat.completions.create(asked)).usage.completion_tokens, 12);
  },

  async "models are listed"() {
    assert.deepEqual((await client.models.list()).data.map(({ id }) => id), ["tiny"]);
  },
};

for (const [name, holds] of Object.entries(cases)) {
  await holds();
  console.log(`ok ${name}`);
}
