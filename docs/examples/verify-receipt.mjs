// Verifies receipts of flexgate (docs/receipts.md) with nothing but Web Crypto: in Node 20 or later, and in browsers.
//
//   node verify-receipt.mjs --jwks jwks.json receipt.json …
//   import { parseKeys, verifyReceipt } from "./verify-receipt.mjs"
const HASH = /^[0-9a-f]{64}$/, NUMBER = /^(0|[1-9][0-9]{0,18})$/, POSITIVE = /^[1-9][0-9]{0,18}$/;
const RECEIPT = /^dec_[0-9a-f]{32}$/, ID = /^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$/, SIGNATURE = /^[0-9a-f]{128}$/;
const FORMAT = /^flexgate-receipt\/1$/, BATCH = /^flexgate-receipt-batch\/1$/, SERVER = /^srv_[0-9a-f]{32}$/;
const HEADER = { at: NUMBER, first: POSITIVE, format: BATCH, kid: ID, last: POSITIVE, number: POSITIVE, previous: HASH,
  root: HASH, server: SERVER };
const JWK = { alg: /^EdDSA$/, crv: /^Ed25519$/, kid: ID, kty: /^OKP$/, use: /^sig$/, x: ID };
const utf8 = (text) => new TextEncoder().encode(text);
const hex = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
const unhex = (text) => Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
const unbase64 = (text) => Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (c) => c.charCodeAt(0));
const join = (...parts) => Uint8Array.from(parts.flatMap((part) => [...part]));
const sha256 = async (bytes) => new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
const leafHash = (data) => sha256(join([0], data));
const nodeHash = (left, right) => sha256(join([1], left, right));
const check = (holds, message) => { if (!holds) throw new Error(message); };

/** JSON by RFC 8785, of whole numbers only; nested no deeper than `depth`. */
export function canonical(value, depth = 8) {
  check(depth >= 0, "it is nested too deeply");
  if (typeof value === "number") check(Number.isSafeInteger(value), "it has a number that readers read differently");
  if (typeof value === "string") check(!/\p{Surrogate}/u.test(value), "it has an unpaired surrogate");
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map((one) => canonical(one, depth - 1)).join(",")}]`;
  const names = Object.keys(value).sort();
  return `{${names.map((name) => `${canonical(name, 0)}:${canonical(value[name], depth - 1)}`).join(",")}}`;
}

/** The value of bytes that are canonical JSON, with at most one line break after it. */
export function parse(bytes) {
  const end = bytes.at(-1) === 10 ? bytes.length - 1 : bytes.length;
  check(end <= 1 << 20, "it has more than 1048576 bytes");
  const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes.subarray(0, end));
  const value = JSON.parse(text);
  check(canonical(value) === text, "it is not canonical JSON");
  return value;
}
function members(value, what, names) {
  check(isObject(value), `${what} is no object`);
  check(canonical(Object.keys(value).sort()) === canonical([...names].sort()), `${what} must have ${names}`);
  return value;
}
function texts(value, what, patterns) {
  const own = (name) => (Object.hasOwn(value, name) && typeof value[name] === "string" ? value[name] : "");
  for (const name of Object.keys(patterns)) check(patterns[name].test(own(name)), `'${name}' of ${what} is wrong`);
  return value;
}
function listOf(value, what, holds, least = 1) {
  check(Array.isArray(value) && value.length >= least && value.every(holds), `${what} is not the list that it must be`);
  return value;
}
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const hashes = (value) => listOf(value, "a path", (one) => typeof one === "string" && HASH.test(one), 0).map(unhex);

/** The root that a path leads to from a leaf's hash, in a tree of `size` leaves (RFC 9162, 2.1.3.2). */
async function rootFrom(hash, index, size, path) {
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
    check(hex(unbase64(kid)) === hex(thumbprint), `the key id ${kid} is not its key's thumbprint`);
    check(!keys.has(kid), `the key ${kid} is there twice`);
    keys.set(kid, await crypto.subtle.importKey("raw", unbase64(x), { name: "Ed25519" }, false, ["verify"]));
  }
  return keys;
}

/** Verifies a copy of a receipt; returns what it says, and throws an Error that says what is wrong. */
export async function verifyReceipt(bytes, keys) {
  const receipt = parse(bytes), opened = receipt !== null && Object.hasOwn(receipt, "opening");
  members(receipt, "the receipt", ["batch", "format", "hashes", "leaves", "number", ...(opened ? ["opening"] : [])]);
  texts(receipt, "the receipt", { format: FORMAT, number: NUMBER, ...(opened ? { opening: HASH } : {}) });
  const { header, path, signature } = members(receipt.batch, "'batch'", ["header", "path", "signature"]);
  texts(members(header, "the header", Object.keys(HEADER)), "the header", HEADER);
  texts(receipt.batch, "the batch", { signature: SIGNATURE });
  check(keys.has(header.kid), `it is signed with the key ${header.kid}, which is not in the key set`);
  const signed = await crypto.subtle.verify("Ed25519", keys.get(header.kid), unhex(signature), utf8(canonical(header)));
  check(signed, "its signature is wrong");
  const first = BigInt(header.first), size = BigInt(header.last) - first + 1n;
  check(size >= 1n && size <= 65536n, "the size of its batch is wrong");
  const known = hashes(receipt.hashes), contents = [];
  let before = -1;
  for (const entry of listOf(receipt.leaves, "'leaves'", isObject)) {
    const { content, index, salt } = members(entry, "a leaf", ["content", "index", "salt"]);
    texts(entry, "a leaf", { salt: HASH });
    const isNext = Number.isInteger(index) && index > before && index < known.length;
    check(isNext && isObject(content), "the places of its leaves are wrong");
    texts(content, "a leaf", { kind: /^(request|owner|none)$/, receipt: RECEIPT });
    const hash = await leafHash(join(unhex(salt), utf8(canonical(content))));
    check(hex(hash) === hex(known[index]), "a leaf is not the one that its receipt has in its place");
    contents.push(content);
    before = index;
  }
  check(new Set(contents.map((one) => one.receipt)).size === 1, "its leaves are of several receipts");
  const above = await leafHash(await sha256(join([2], ...known)));
  const root = await rootFrom(above, BigInt(receipt.number) - first, size, hashes(path));
  check(root === header.root, "its leaves do not lead to the root that was signed");
  if (opened) {
    const digests = contents.filter((one) => one.kind === "request").map((one) => one.opening_digest);
    const digest = hex(await sha256(unhex(receipt.opening)));
    check(digests.length === 1 && digests[0] === digest, "its opening is not the one of its request");
  }
  const complete = contents.length === known.length;
  if (complete) requireConsistent(contents);
  return { receipt: contents[0].receipt, number: receipt.number, batch: header, leaves: contents, complete };
}

/** Of a whole receipt: one request, and of each owner one leaf, with the shares that the request's leaf says. */
function requireConsistent(contents) {
  const of = (kind) => contents.filter((one) => one.kind === kind);
  const row = (one, owner) => canonical([one.expert ?? null, owner ?? null, one.share_ppm ?? null]);
  const experts = (one) => listOf(one.experts, "'experts'", isObject, 0);
  const owned = of("owner").flatMap((one) => experts(one).map((expert) => row(expert, one.owner)));
  const named = of("request").flatMap(experts).filter((expert) => (expert.owner ?? null) !== null);
  const said = named.map((expert) => row(expert, expert.owner));
  const owners = new Set(of("owner").map((one) => canonical(one.owner ?? null)));
  const fits = owned.sort().join() === said.sort().join() && owners.size === of("owner").length;
  check(of("request").length === 1 && fits, "its owners' leaves are not those that its request names");
}

if (globalThis.process?.argv[1]?.endsWith("verify-receipt.mjs")) {
  const { readFileSync } = await import("node:fs");
  const [option, jwks, ...files] = process.argv.slice(2);
  if (option !== "--jwks" || !files.length) throw new Error("usage: node verify-receipt.mjs --jwks JWKS RECEIPT …");
  const keys = await parseKeys(readFileSync(jwks));
  for (const file of files) {
    const { error, receipt, number } = await verifyReceipt(readFileSync(file), keys).catch((error) => ({ error }));
    console.log(error ? `${file}: not valid: ${error.message}` : `${file}: OK: receipt ${receipt}, number ${number}`);
    process.exitCode ||= error ? 1 : 0;
  }
}
