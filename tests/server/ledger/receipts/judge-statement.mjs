// Says of each bundle of files on standard input whether docs/examples/verify-statement.mjs takes it: the first line is the
// key set, each further one the lines of all files in base64; one line of output for each, empty where it is valid.
import { readFileSync } from "node:fs";
import { parseKeys } from "../../../../docs/examples/verify-receipt.mjs";
import { verifyTogether } from "../../../../docs/examples/verify-statement.mjs";

const [jwks, ...bundles] = readFileSync(0, "utf8").trim().split("\n").map((line) => Buffer.from(line, "base64"));
const keys = await parseKeys(jwks);
for (const bundle of bundles) {
  const lines = bundle.toString("utf8").split("\n").filter(Boolean);
  const wrong = await verifyTogether(lines, keys).then(() => null, (error) => error);
  console.log(wrong === null ? "" : `${wrong.message || wrong}`.replaceAll("\n", " "));
}
