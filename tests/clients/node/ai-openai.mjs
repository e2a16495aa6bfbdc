// The AI SDK with its default provider, which speaks Responses. Without `store: false` it refers to items that are stored.
import { createOpenAI } from "@ai-sdk/openai";
import { paths } from "./ai.mjs";

const provider = createOpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY });
export const { conversation, tools, stream, structured, refusal } = paths(provider(process.env.FLEXGATE_MODEL), {
  providerOptions: { openai: { store: false } },
});
