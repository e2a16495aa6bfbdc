// Verifies receipts of flexgate (docs/receipts.md) with nothing but Web Crypto: in Node 20 or later, and in browsers.
//   node verify-receipt.mjs --jwks jwks.json receipt.json …    or import it, as verify-statement.mjs does
export const HASH = /^[0-9a-f]{64}$/, NUMBER = /^(0|[1-9][0-9]{0,18})$/, POSITIVE = /^[1-9][0-9]{0,18}$/, ZEROS = /^0{64}$/;
export const RECEIPT = /^dec_[0-9a-f]{32}(_counterfactual)?$/, SERVER = /^srv_[0-9a-f]{32}$/, SIGNATURE = /^[0-9a-f]{128}$/;
export const ID = /^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$/, FORMAT = /^flexgate-receipt\/1$/, BATCH = /^flexgate-receipt-batch\/1$/;
const HEADER = { at: NUMBER, first: POSITIVE, format: BATCH, kid: ID, last: POSITIVE, number: POSITIVE, previous: HASH,
  root: HASH, server: SERVER };
const JWK = { alg: /^EdDSA$/, crv: /^Ed25519$/, kid: ID, kty: /^OKP$/, use: /^sig$/, x: ID };
const LEFT_OUT = { expert: /^[^\n]+$/, grade: /^(removed|router|shared|unknown)$/ };
const FACTS = ["completion_tokens", "ended_at", "outcome", "prompt_tokens"], utf8 = (text) => new TextEncoder().encode(text);
export const hex = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
export const unhex = (text) => Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
const unbase64 = (text) => Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (c) => c.charCodeAt(0));
const join = (...parts) => Uint8Array.from(parts.flatMap((part) => [...part]));
export const sha256 = async (bytes) => new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
export const leafHash = (data) => sha256(join([0], data)), nodeHash = (left, right) => sha256(join([1], left, right));
export const check = (holds, message) => { if (!holds) throw new Error(message); };
export const must = (value, holds, message) => (check(holds, message), value);
/** JSON by RFC 8785, of whole numbers only; nested no deeper than `depth`. */
export function canonical(value, depth = 8) {
  const isFine = typeof value === "string" ? !/\p{Surrogate}/u.test(value) : typeof value !== "number" || Number.isSafeInteger(value);
  check(depth >= 0 && isFine, "it is nested too deeply, or has what readers read differently");
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map((one) => canonical(one, depth - 1)).join(",")}]`;
  return `{${Object.keys(value).sort().map((k) => `${canonical(k, 0)}:${canonical(value[k], depth - 1)}`).join(",")}}`;
}
/** The value of bytes that are canonical JSON, with at most one line break after it. */
export function parse(bytes, most = 1 << 20) {
  const end = bytes.at(-1) === 10 ? bytes.length - 1 : bytes.length;
  check(end <= most, `it has more than ${most} bytes`);
  const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes.subarray(0, end));
  return must(JSON.parse(text), canonical(JSON.parse(text)) === text, "it is not canonical JSON");
}
const sorted = (value, names) => isObject(value) && canonical(Object.keys(value).sort()) === canonical([...names].sort());
export const members = (value, what, names) => must(value, sorted(value, names), `${what} must have ${names}, and nothing else`);
export function texts(value, what, patterns) {
  const own = (name) => (Object.hasOwn(value, name) && typeof value[name] === "string" ? value[name] : "");
  for (const name of Object.keys(patterns)) check(patterns[name].test(own(name)), `'${name}' of ${what} is wrong`);
  return value;
}
export const listOf = (value, what, holds, least = 1) =>
  must(value, Array.isArray(value) && value.length >= least && value.every(holds), `${what} is not a list as it must be`);
export const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
export const hashes = (value) => listOf(value, "a path", (one) => typeof one === "string" && HASH.test(one), 0).map(unhex);
/** The root that a path leads to from a leaf's hash, in a tree of `size` leaves (RFC 9162, 2.1.3.2). */
export async function rootFrom(hash, index, size, path) {
  check(index >= 0n && index < size, "it has no place in its batch");
  const rest = [...path];
  for (let last = size - 1n; last; index >>= 1n, last >>= 1n) {
    if (!(index & 1n) && index === last) continue;
    check(rest.length, "a path is too short");
    hash = await (index & 1n ? nodeHash(rest.shift(), hash) : nodeHash(hash, rest.shift()));
  }
  check(!rest.length, "a path is too long");
  return hex(hash);
}
/** The keys of a JWK set, by their thumbprints (RFC 7638). */
export async function parseKeys(bytes) {
  const keys = new Map();
  for (const entry of listOf(members(parse(bytes), "the key set", ["keys"]).keys, "'keys'", isObject)) {
    const { kid, x } = texts(members(entry, "a key", Object.keys(JWK)), "a key", JWK);
    const thumbprint = await sha256(utf8(`{"crv":"Ed25519","kty":"OKP","x":"${x}"}`));
    check(!keys.has(kid) && hex(unbase64(kid)) === hex(thumbprint), `${kid} is there twice, or no thumbprint of its key`);
    keys.set(kid, await crypto.subtle.importKey("raw", unbase64(x), { name: "Ed25519" }, false, ["verify"]));
  }
  return keys;
}
/** What names its key in `kid` must be what was signed. */
export async function requireSigned(value, signature, keys) {
  const { kid } = texts({ ...value, signature }, "what is signed", { kid: ID, signature: SIGNATURE });
  const key = must(keys.get(kid), keys.has(kid), `it is signed with the key ${kid}, which is not in the key set`);
  check(await crypto.subtle.verify("Ed25519", key, unhex(signature), utf8(canonical(value))), "its signature is wrong");
}
/** Verifies a copy of a receipt; returns what it says, and throws an Error that says what is wrong. */
export async function verifyReceipt(bytes, keys) {
  const value = parse(bytes), opened = value !== null && Object.hasOwn(value, "opening");
  members(value, "the receipt", ["batch", "format", "hashes", "leaves", "number", ...(opened ? ["opening"] : [])]);
  texts(value, "the receipt", { format: FORMAT, number: NUMBER, ...(opened ? { opening: HASH } : {}) });
  const { header, path, signature } = members(value.batch, "'batch'", ["header", "path", "signature"]);
  texts(members(header, "the header", Object.keys(HEADER)), "the header", HEADER);
  await requireSigned(header, signature, keys);
  const first = BigInt(header.first), size = BigInt(header.last) - first + 1n;
  const begins = header.number !== "1" || (first === 1n && ZEROS.test(header.previous));
  check(begins && first >= BigInt(header.number) && size >= 1n && size <= 65536n, "its batch has the wrong numbers");
  const known = hashes(value.hashes), leaves = new Map();
  for (const entry of listOf(value.leaves, "'leaves'", isObject)) {
    const { content, index, salt } = members(entry, "a leaf", ["content", "index", "salt"]);
    const isNext = Number.isInteger(index) && index > ([...leaves.keys()].at(-1) ?? -1) && index < known.length;
    check(isNext && isObject(content), "the places of its leaves are wrong");
    texts(content, "a leaf", { kind: /^(request|owner|hidden|none)$/, receipt: RECEIPT });
    const hash = await leafHash(join(unhex(texts(entry, "a leaf", { salt: HASH }).salt), utf8(canonical(content))));
    check(hex(hash) === hex(known[index]), "a leaf is not the one that its receipt has in its place");
    leaves.set(index, content);
  }
  const contents = [...leaves.values()], [receipt, ...others] = new Set(contents.map((one) => one.receipt));
  check(!others.length, "its leaves are of several receipts");
  const leaf = await leafHash(await sha256(join([2], ...known)));
  const root = await rootFrom(leaf, BigInt(value.number) - first, size, hashes(path));
  check(root === header.root, "its leaves do not lead to the root that was signed");
  const digest = opened && hex(await sha256(unhex(value.opening)));
  check(!opened || contents.some((one) => one.kind === "request" && one.opening_digest === digest), "it opens nothing");
  requireConsistent(contents, leaves.size === known.length);
  return { receipt, number: value.number, batch: header, leaf, leaves, size: known.length };
}
/** Verifies that copies tell one history: a request has one receipt, and what copies of it show fits together. */
export function verifyCopies(found) {
  const known = new Map(), joined = new Map();
  for (const { receipt, number, batch, leaves, size } of found) {
    const place = `number ${number} of ${batch.server}`, fork = `batch ${batch.number} of ${batch.server}`;
    for (const [key, said] of [[receipt, place], [place, receipt], [fork, canonical(batch)], [`${place}'s batch`, fork]])
      check(known.set(key, known.get(key) ?? said).get(key) === said, `there are two of ${key}`);
    joined.set(place, new Map([...(joined.get(place) ?? []), ...leaves]));
    requireConsistent([...joined.get(place).values()], joined.get(place).size === size);
  }
}
/** Of one receipt: one request, and of each owner one leaf that says what the request says; all, if it is complete. */
function requireConsistent(leaves, complete) {
  const [requests, owners, hidden] = ["request", "owner", "hidden"].map((kind) => leaves.filter((leaf) => leaf.kind === kind));
  for (const { experts, kind } of [...requests, ...owners]) {
    const add = (sum, { share_ppm: ppm }) => sum + (Number.isInteger(ppm) && ppm >= 0 ? ppm : NaN);
    const total = listOf(experts, "'experts'", isObject, 0).reduce(add, 0);
    check(total === 1e6 || (kind === "owner" ? total < 1e6 : total === 0), `its shares sum to ${total} millionths`);
  }
  const excluded = (leaf) => listOf("excluded" in leaf ? leaf.excluded : [], "'excluded'", isObject, 0);
  const out = [...requests, ...hidden].flatMap(excluded).map((one) => texts(one, "what was left out", LEFT_OUT).expert);
  const used = new Set([...requests, ...owners].flatMap((leaf) => leaf.experts.map((one) => one.expert)));
  check(new Set(out).size === out.length && !out.some((one) => used.has(one)), "an expert was left out twice, or took part");
  const rows = (experts) => experts.map((one) => canonical([one.expert ?? null, one.share_ppm])).sort();
  const says = (leaf, experts) => canonical([FACTS.map((fact) => leaf[fact] ?? null), rows(experts)]);
  const owner = ({ owner: name }) => must(name, typeof name === "string", "an owner has no name");
  const said = new Map(owners.map((leaf) => [owner(leaf), says(leaf, leaf.experts)]));
  const isSingle = requests.length <= 1 && hidden.length <= 1 && said.size === owners.length && requests.length >= complete;
  for (const request of must(requests, isSingle, "it lacks a leaf, or has two")) {
    const owned = request.experts.filter((expert) => (expert.owner ?? null) !== null);
    const names = new Set(owned.map(owner)), of = (name) => says(request, owned.filter((expert) => expert.owner === name));
    const fits = [...said].every(([name, text]) => names.has(name) && of(name) === text);
    check(fits && (!complete || names.size === said.size), "its owners' leaves are not what its request says");
  }
}
if (globalThis.process?.argv[1]?.endsWith("verify-receipt.mjs")) {
  const { readFileSync } = await import("node:fs"), [option, jwks, ...files] = process.argv.slice(2);
  if (option !== "--jwks" || !files.length) throw new Error("usage: node verify-receipt.mjs --jwks JWKS RECEIPT …");
  const keys = await parseKeys(readFileSync(jwks)), found = [];
  const wrong = (error) => must(`not valid: ${error.message}`, (process.exitCode = 1));
  const said = ({ receipt, number, leaves, size }) => `OK: ${leaves.size === size ? "the whole" : "a copy of"} receipt `
    + `${receipt}, number ${number}: ${[...leaves.values()].map((leaf) => leaf.owner ?? leaf.kind).join(", ")}`;
  for (const file of files)
    console.log(`${file}: ${await verifyReceipt(readFileSync(file), keys).then((one) => said(one, found.push(one))).catch(wrong)}`);
  try { verifyCopies(found); } catch (error) { console.log(`together: ${wrong(error)}`); }
}
