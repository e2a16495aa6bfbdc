// The AI SDK with its provider for servers that are like OpenAI's.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { paths } from "./ai.mjs";

const provider = createOpenAICompatible({
  name: "flexgate",
  baseURL: process.env.OPENAI_BASE_URL,
  apiKey: process.env.OPENAI_API_KEY,
  supportsStructuredOutputs: true,
});
export const { conversation, tools, stream, structured, refusal } = paths(provider(process.env.FLEXGATE_MODEL));
