// The AI SDK's paths, over whichever provider gives the model.
import assert from "node:assert/strict";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const inputSchema = z.object({ city: z.enum(["Paris", "Oslo"]) });
const common = { maxOutputTokens: 400, temperature: 0, maxRetries: 0 };

export function paths(model, more = {}) {
  const options = { ...common, ...more };
  return {
    async conversation() {
      const first = await generateText({ model, prompt: "Hello", ...options });
      const hello = { role: "user", content: "Hello" };
      const messages = [hello, ...first.response.messages, hello];
      assert.ok((await generateText({ model, messages, ...options })).text);
    },
    async tools() {
      let called = 0;
      const execute = async () => ((called += 1), "Sun.");
      const tools = { weather: tool({ description: "The weather in a city.", inputSchema, execute }) };
      const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber ? "auto" : "required" });
      const end = await generateText({ model, prompt: "Hello", tools, prepareStep, stopWhen: stepCountIs(2), ...options });
      assert.ok(called > 0);
      assert.equal(end.steps.length, 2);
    },
    async stream() {
      const run = streamText({ model, prompt: "Hello", ...options });
      let text = "";
      for await (const part of run.textStream) text += part;
      assert.ok(text);
    },
    async structured() {
      const output = Output.object({ schema: inputSchema });
      const answer = await generateText({ model, prompt: "Hello", output, ...options });
      assert.ok(["Paris", "Oslo"].includes(answer.output.city));
    },
    async refusal() {
      await assert.rejects(generateText({ model, prompt: "x ".repeat(3000), ...options }), (error) => {
        assert.equal(error.statusCode, 400);
        assert.match(error.responseBody, /context_length_exceeded/);
        return true;
      });
    },
  };
}
