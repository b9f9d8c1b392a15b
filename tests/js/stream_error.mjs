// One stream through npm's `ai`: prints what a program would see of it, as one line of JSON.
// Usage: node stream_error.mjs BASE_URL KEY MODEL

import { createOpenAI } from "@ai-sdk/openai";
import { streamText } from "ai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const saw = { text: "", finishReason: null, errors: [], rejection: null };

const result = streamText({
  model: createOpenAI({ baseURL, apiKey }).chat(model),
  prompt: "hi",
  maxRetries: 0,
  onError: () => {}, // else it is written to the console; the part below tells it
});

try {
  for await (const part of result.fullStream) {
    if (part.type === "text-delta") saw.text += part.text;
    if (part.type === "finish") saw.finishReason = part.finishReason;
    if (part.type === "error") saw.errors.push(describe(part.error));
  }
} catch (error) {
  saw.rejection = describe(error);
}
console.log(JSON.stringify(saw));

function describe(error) {
  return String(error?.message ?? JSON.stringify(error));
}
