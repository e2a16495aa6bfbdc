// Verifies signed statements of flexgate (docs/receipts.md) against receipts, with the files beside it and Web Crypto alone.
//   node verify-statement.mjs --jwks jwks.json statement.json receipts.jsonl      (or receipt.json proof.json …)
import { leafOf, verifyHistory } from "./verify-history.mjs";
import { HASH, ID, NUMBER, RECEIPT, SERVER, check, hashes, hex, isObject, listOf, members, must, nodeHash, parse, parseKeys,
  canonical, requireSigned, rootFrom, sha256, texts, verifyCopies, verifyReceipt } from "./verify-receipt.mjs";
const NAME = /^[^\n]+$/, EXACT = /^(0|[1-9][0-9]{0,30})(\.[0-9]{1,21})?$/, CURRENCY = /^[A-Z]{3}$/;
const PLACES = { owner: NAME, period: NAME, receipts: NUMBER, root: HASH, server: SERVER };
const STATEMENT = { at: NUMBER, end: NUMBER, format: /^flexgate-statement\/1$/, kid: ID, last: NUMBER, start: NUMBER, ...PLACES };
const PROOF = { format: /^flexgate-statement-proof\/1$/, index: NUMBER, number: NUMBER, receipt: RECEIPT, ...PLACES };
const TOTAL = { amount: /^-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,21})?$/, currency: CURRENCY };
const CORRECTION = { ...TOTAL, at: NUMBER, id: NAME, reason: NAME, receipt: RECEIPT };
const DIGITS = new Map([[0, "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"], [3, "BHD IQD JOD KWD LYD OMR TND"],
  [4, "CLF UYW"]].flatMap(([digits, names]) => names.split(" ").map((name) => [name, digits])));
const COUNTS = ["requests", "share_weighted_ppm", "tokens"];
const PER = { request: ["requests", 0n], thousand_tokens: ["tokens", 3n], million_tokens: ["tokens", 6n],
  thousand_share_weighted_tokens: ["share_weighted_ppm", 9n], million_share_weighted_tokens: ["share_weighted_ppm", 12n] };
const number = (value, name) => BigInt(texts(value, `'${name}'`, { [name]: NUMBER })[name]);
/** A decimal number of at most 21 digits after the point, as a whole number of 10⁻²¹. */
const scaled = (text, [whole, rest = ""] = text.split(".")) => BigInt(whole + rest.padEnd(21, "0"));
/** An amount in 10⁻²¹ rounded to so many digits after the point, half to even, still in 10⁻²¹. */
function rounded(value, digits) {
  if (value < 0n) return -rounded(-value, digits);
  const unit = 10n ** BigInt(21 - digits), whole = value / unit, twice = 2n * (value % unit);
  return (twice > unit || (twice === unit && whole % 2n === 1n) ? whole + 1n : whole) * unit;
}
/** The expert and agreement that a line, or a part of a receipt, is of. */
function placeOf({ agreement = null, agreement_version: version = null, expert }) {
  const isName = (one) => one === null || typeof one === "string";
  check(typeof expert === "string" && isName(agreement) && isName(version), "it does not name an expert and an agreement");
  return canonical([agreement, version, expert]);
}
/** The start and end of a day or a month in UTC, in microseconds of Unix time. */
function timesOf(period) {
  const [, year, month, day] = /^(\d{4})-(\d\d)(?:-(\d\d))?$/.exec(period) ?? must([], false, "it has no period");
  const at = (months, days) => BigInt(Date.UTC(year, month - 1 + months, Number(day ?? 1) + days)) * 1000n;
  check(new Date(Number(at(0, 0) / 1000n)).toISOString().startsWith(period), `there is no period ${period}`);
  return [at(0, 0), day ? at(0, 1) : at(1, 0)];
}
/** Verifies a signed statement by itself: signature, period, and every amount from rates and counts. */
export async function verifyStatement(bytes, keys) {
  const { signature, statement } = members(parse(bytes, 16 << 20), "the file", ["signature", "statement"]);
  texts(must(statement, isObject(statement), "'statement' must be an object"), "the statement", STATEMENT);
  await requireSigned(statement, signature, keys);
  texts(members(statement.head, "'head'", ["hash", "number"]), "'head'", { hash: HASH, number: NUMBER });
  const [start, end] = timesOf(statement.period), isWhole = start === BigInt(statement.start) && end === BigInt(statement.end);
  check(isWhole && typeof statement.provisional === "boolean", "its times, or whether it is provisional, are wrong");
  const lines = new Map(), sums = new Map(), totals = new Set(), ids = new Set();
  const add = (currency, value) => sums.set(currency, (sums.get(currency) ?? 0n) + value);
  for (const line of listOf(statement.lines, "'lines'", isObject, 0)) {
    const place = placeOf(line), duties = listOf(line.compensate, "'compensate'", isObject, 0);
    check(!lines.has(place), `the line of ${place} is there twice`);
    lines.set(place, COUNTS.map((name) => number(line, name)));
    if (!duties.length && (line.amount ?? null) === null && (line.currency ?? null) === null) continue;
    const { amount, currency } = texts(line, "a line", { amount: EXACT, currency: CURRENCY });
    const owed = duties.map((duty) => {
      const { rate, unit } = texts(members(duty, "a rate", ["rate", "unit"]), "a rate", { rate: EXACT, unit: NAME });
      const [name, digits] = must(PER[unit], Object.hasOwn(PER, unit), `there is no unit ${unit}`), per = 10n ** digits;
      const product = scaled(rate) * number(line, name);
      return must(product / per, product % per === 0n, `the rate ${rate} is too fine`);
    }).reduce((sum, one) => sum + one, 0n);
    check(duties.length && owed === scaled(amount), `the amount of ${place} is not what its rates make of its counts`);
    add(currency, owed);
  }
  for (const one of listOf(statement.corrections, "'corrections'", isObject, 0)) {
    const { amount, at, currency, id } = texts(one, "a correction", CORRECTION);
    check(BigInt(at) >= start && BigInt(at) < end && !ids.has(id), `the correction ${id} is there twice, or of another period`);
    add(currency, scaled(amount), ids.add(id));
  }
  for (const total of listOf(statement.totals, "'totals'", isObject, 0)) {
    const { amount, currency } = texts(members(total, "a total", Object.keys(TOTAL)), "a total", TOTAL);
    const digits = (amount.split(".")[1] ?? "").length, fits = scaled(amount) === rounded(sums.get(currency) ?? 0n, digits);
    check(digits >= (DIGITS.get(currency) ?? 2), `its total in ${currency} has too few digits`);
    check(!totals.has(currency) && fits, `its total in ${currency} is not the sum of its lines`);
    totals.add(currency);
  }
  check([...sums.keys()].sort().join() === [...totals].sort().join(), "it has not one total for each currency");
  return { ...statement, lines, says: statement };
}
/** A proof that a receipt is among those of a statement; it says nothing by itself. */
export const parseProof = (bytes, proof = members(parse(bytes), "the proof", ["path", ...Object.keys(PROOF)])) =>
  ({ ...texts(proof, "the proof", PROOF), path: hashes(proof.path) });
async function rootOf(level) {
  if (level.length < 2) return hex(level[0] ?? (await sha256(new Uint8Array())));
  const pairs = Array.from({ length: level.length >> 1 }, (_, at) => nodeHash(level[2 * at], level[2 * at + 1]));
  return rootOf([...(await Promise.all(pairs)), ...level.slice(2 * pairs.length)]);
}
const both = (value, what) => number(value, `prompt_${what}`) + number(value, `completion_${what}`);
/** What a request adds to each line. */
const usesOf = (leaf) => leaf.experts.map((expert) =>
  [placeOf(expert), [1n, both(leaf, "tokens") * BigInt(expert.share_ppm), both(expert, "positions")]]);
/** Whether receipts that were not given, of which each adds one request, can make up the rest of a line. */
function fits(line = [-1n], given, missing) {
  const [requests, ...more] = line.map((count, at) => count - (given?.[at] ?? 0n));
  return requests === 0n ? given && !more.some(Boolean) : requests > 0n && requests <= missing && more.every((one) => one >= 0n);
}
/** A statement must count the receipts that were given; returns what was compared. */
export async function verifyCounted(statement, copies, proofs) {
  const counted = new Map(copies.filter((one) => leafOf(statement, one)).map((one) => [BigInt(one.number), one]));
  const size = BigInt(statement.receipts), given = BigInt(counted.size), missing = size - given, sums = new Map();
  check(missing >= 0n, `it counts ${size} receipts, and leaves out some of the ${given} that were given`);
  const all = [...counted].sort(([a], [b]) => (a < b ? -1 : 1)).map(([, one]) => one);
  for (const [place, counts] of all.flatMap((one) => usesOf(leafOf(statement, one))))
    sums.set(place, counts.map((count, at) => count + (sums.get(place)?.[at] ?? 0n)));
  const holds = [...sums.keys(), ...statement.lines.keys()].every((one) => fits(statement.lines.get(one), sums.get(one), missing));
  check(holds, "its figures are not those of its receipts");
  const isAll = !missing && (await rootOf(all.map((one) => one.leaf))) === statement.root;
  check(missing || isAll, "it counts other receipts than those that were given");
  if (isAll) return `it counts the ${given} receipts that were given, and no others; its figures are theirs`;
  let before = -1n;
  for (const { leaf, receipt } of all) {
    const isIts = (one) => one.receipt === receipt && ["owner", "period", "server"].every((name) => one[name] === statement[name]);
    const proof = proofs.findLast(isIts), index = BigInt(proof?.index ?? 0);
    check(proof, `nothing shows that ${receipt} is among its ${size} receipts: if the server has no proof, it was left out`);
    const leads = index > before && (await rootFrom(leaf, index, size, proof.path)) === statement.root;
    before = must(index, leads, `the proof does not lead from ${receipt}, behind those before it, to its root`);
  }
  return `it counts the ${given} receipts that were given, of ${size}; its figures were not made again: ${missing} are missing`;
}
/** Verifies what lines of files say together; returns a sentence for each statement. */
export async function verifyTogether(lines, keys) {
  const statements = [], copies = [], proofs = [], bytes = (line) => new TextEncoder().encode(line);
  for (const line of lines) {
    if (line.startsWith('{"signature":')) statements.push(await verifyStatement(bytes(line), keys));
    else if (line.startsWith('{"format":')) proofs.push(parseProof(bytes(line)));
    else copies.push(await verifyReceipt(bytes(line), keys));
  }
  verifyCopies(copies);
  await verifyHistory(statements, copies);
  return Promise.all(statements.map(async (one) => `${one.period} for ${one.owner}: ${await verifyCounted(one, copies, proofs)}`));
}
if (globalThis.process?.argv[1]?.endsWith("verify-statement.mjs")) {
  const { readFileSync } = await import("node:fs");
  const [option, jwks, ...files] = process.argv.slice(2);
  if (option !== "--jwks" || !files.length) throw new Error("usage: node verify-statement.mjs --jwks JWKS STATEMENT RECEIPTS …");
  const lines = files.flatMap((file) => readFileSync(file, "utf8").split("\n").filter(Boolean));
  const keys = await parseKeys(readFileSync(jwks));
  try { for (const one of await verifyTogether(lines, keys)) console.log(`OK: statement ${one}`); }
  catch (error) { console.log(`not valid: ${error.message}`); process.exitCode = 1; }
}
