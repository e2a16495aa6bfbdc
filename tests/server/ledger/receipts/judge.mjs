// Says of each receipt on standard input whether docs/examples/verify-receipt.mjs takes it: the first line is the key set,
// each further one a receipt, in base64; one line of output for each, empty where it is valid.
import { readFileSync } from "node:fs";
import { parseKeys, verifyReceipt } from "../../../../docs/examples/verify-receipt.mjs";

const [jwks, ...receipts] = readFileSync(0, "utf8").trim().split("\n").map((line) => Buffer.from(line, "base64"));
const keys = await parseKeys(jwks).catch((error) => error);
for (const receipt of receipts) {
  const wrong = keys instanceof Error ? keys : await verifyReceipt(receipt, keys).then(() => null, (error) => error);
  console.log(wrong === null ? "" : `${wrong.message || wrong}`.replaceAll("\n", " "));
}
