// The `openai` package for Node.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const model = process.env.FLEXGATE_MODEL;
const hello = { role: "user", content: "Hello" };
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};

export async function conversation() {
  const first = await client.chat.completions.create({ model, messages: [hello], max_tokens: 8 });
  const messages = [hello, first.choices[0].message, hello];
  assert.ok((await client.chat.completions.create({ model, messages, max_tokens: 8 })).choices[0].message.content);
  const said = await client.responses.create({ model, input: [hello], max_output_tokens: 8 });
  const again = await client.responses.create({ model, input: [hello, ...said.output, hello], max_output_tokens: 8 });
  assert.ok(again.output_text);
}

export async function tools() {
  const tool = { type: "function", function: { name: "weather", parameters } };
  const ask = { model, tools: [tool], max_tokens: 400, temperature: 0 };
  const called = await client.chat.completions.create({ ...ask, messages: [hello], tool_choice: "required" });
  const message = called.choices[0].message;
  assert.ok(["Paris", "Oslo"].includes(JSON.parse(message.tool_calls[0].function.arguments).city));
  const results = message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: "Sun." }));
  const end = await client.chat.completions.create({ ...ask, messages: [hello, message, ...results] });
  assert.ok(end.choices.length);
}

export async function stream() {
  const run = client.chat.completions.stream({ model, messages: [hello], max_tokens: 4 });
  assert.ok(await run.finalContent());
  const kinds = [];
  for await (const event of await client.responses.create({ model, input: "Hello", max_output_tokens: 4, stream: true }))
    kinds.push(event.type);
  assert.equal(kinds.at(-1), "response.incomplete");
}

export async function structured() {
  const json_schema = { name: "choice", schema: parameters, strict: true };
  const answer = await client.chat.completions.parse({
    model,
    messages: [hello],
    response_format: { type: "json_schema", json_schema },
    max_tokens: 200,
    temperature: 0,
  });
  assert.ok(["Paris", "Oslo"].includes(JSON.parse(answer.choices[0].message.content).city));
}

export async function refusal() {
  const messages = [{ role: "user", content: "x ".repeat(3000) }];
  await assert.rejects(client.chat.completions.create({ model, messages }), {
    status: 400,
    code: "context_length_exceeded",
    param: "messages",
  });
}
