// Verifies an audit log of flexgate, as `flexgate audit export` prints it, with Web Crypto alone: in Node 20 and browsers.
//
//   node verify-audit-log.mjs export.jsonl
//   import { verifyLog } from "./verify-audit-log.mjs"
//
// Of entries of version 1, which were written before there was version 2, only the links are checked.
const ZEROS = "0".repeat(64);
const check = (holds, message) => { if (!holds) throw new Error(message); };
const hex = (bytes) => [...new Uint8Array(bytes)].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** JSON by RFC 8785. */
function canonical(value) {
  const readable = !Number.isInteger(value) || Number.isSafeInteger(value);
  check(readable, "has a number that JavaScript cannot read: use 'flexgate audit verify'");
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  return `{${Object.keys(value).sort().map((name) => `${JSON.stringify(name)}:${canonical(value[name])}`).join(",")}}`;
}

async function hashOf({ sequence, at, actor, action, detail, previous, log }) {
  const microseconds = Math.round(at * 1e6);
  if (microseconds / 1e6 !== at) return null;
  const format = "flexgate-audit/2", time = String(microseconds);
  const content = { action, actor, at: time, detail, format, log, previous, sequence };
  return hex(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(canonical(content))));
}

/** How many keys a line of JSON has, and how many are left of them once it is read. */
const keysIn = (line) => [...line.matchAll(/"(?:[^"\\]|\\.)*"\s*(:?)/g)].filter((found) => found[1]).length;
const keysOf = (value) => value === null || typeof value !== "object" ? 0
  : Object.values(value).reduce((sum, one) => sum + keysOf(one), Array.isArray(value) ? 0 : Object.keys(value).length);

/** Verifies the lines of a log from its first entry on; throws an Error that names the entry. */
export async function verifyLog(text) {
  const heads = { changes: ZEROS, requests: null }, trims = [];
  let newest = 0, entries = 0, old = 0, absent = 0, resumed = ZEROS, gapEnd = 0;
  for (const line of text.split("\n").filter(Boolean)) {
    const entry = JSON.parse(line), { sequence, log } = entry, where = `entry ${sequence}`;
    const names = ["action", "actor", "at", "detail", "hash", "log", "previous", "sequence"];
    check(Object.keys(entry).sort().join() === names.join() && Number.isSafeInteger(sequence), `${where} is no entry`);
    check(keysIn(line) === keysOf(entry), `${where} has a key twice`);
    check(sequence > newest && Object.hasOwn(heads, log), `${where} follows entry ${newest}`);
    if (sequence > newest + 1) [absent, gapEnd] = [absent + sequence - newest - 1, sequence];
    if (log === "requests" && heads.requests === null) resumed = entry.previous;
    else check(entry.previous === heads[log], `${where} does not follow from the one before it`);
    const fits = (await hashOf(entry).catch((error) => check(false, `${where} ${error.message}`))) === entry.hash;
    check(fits || old === entries, `${where} was changed after it was written`);
    old += fits ? 0 : 1;
    if (entry.action === "audit.trimmed") {
      const isTrim = [entry.detail.entries, entry.detail.through + 1].every((one) => Number.isSafeInteger(one) && one >= 1);
      check(isTrim && typeof entry.detail.hash === "string", `${where} does not name what was trimmed`);
      trims.push(entry.detail);
    }
    [heads[log], newest, entries] = [entry.hash, sequence, entries + 1];
  }
  const trimmed = trims.reduce((sum, one) => sum + one.entries, 0), last = trims.at(-1) ?? { through: 0, hash: ZEROS };
  check(trimmed === absent && gapEnd <= last.through + 1, "entries are missing, and no trim is recorded for them");
  check(heads.requests === null || resumed === last.hash, "the first denied request does not match the recorded trim");
  return { entries, old, newest, head: heads.changes };
}

if (globalThis.process?.argv[1]?.endsWith("verify-audit-log.mjs")) {
  const { readFileSync } = await import("node:fs");
  const { entries, old } = await verifyLog(readFileSync(process.argv[2], "utf8"));
  const unchecked = old ? `; of the first ${old} only the links were checked` : "";
  console.log(`OK: ${entries} entries follow from each other${unchecked}`);
}
