// Says of each receipt on standard input whether docs/examples/verify-receipt.mjs takes it: the first line is the key set,
// each further one a receipt in base64, or several, by line breaks, that must be valid together; one line of output for each, empty where it is valid.
import { readFileSync } from "node:fs";
import { parseKeys, verifyCopies, verifyReceipt } from "../../../../docs/examples/verify-receipt.mjs";

const [jwks, ...receipts] = readFileSync(0, "utf8").trim().split("\n").map((line) => Buffer.from(line, "base64"));
const keys = await parseKeys(jwks).catch((error) => error);
for (const receipt of receipts) {
  const copies = receipt.toString("latin1").split("\n{").map((text, at) => Buffer.from((at ? "{" : "") + text, "latin1"));
  const verified = () => Promise.all(copies.map((copy) => verifyReceipt(copy, keys))).then(verifyCopies);
  const wrong = keys instanceof Error ? keys : await verified().then(() => null, (error) => error);
  console.log(wrong === null ? "" : `${wrong.message || wrong}`.replaceAll("\n", " "));
}
