// Verifies that statements and receipts of flexgate tell one history (docs/receipts.md); a part of verify-statement.mjs.
import { NUMBER, canonical, check, hex, sha256, texts } from "./verify-receipt.mjs";
const time = (leaf) => BigInt(texts(leaf, "a leaf", { ended_at: NUMBER }).ended_at);
/** The owner's leaf of a receipt of the period, of whatever server; undefined of others. */
const leafIn = ({ start, end, owner }, { leaves }) => [...leaves.values()].find((leaf) =>
  leaf.kind === "owner" && leaf.owner === owner && time(leaf) >= BigInt(start) && time(leaf) < BigInt(end));
/** The owner's leaf of a receipt that a statement must count; undefined of others. */
export function leafOf(statement, copy) {
  const { last, provisional, server } = statement, isLater = provisional && BigInt(copy.number) > BigInt(last);
  return copy.batch.server !== server || isLater ? undefined : leafIn(statement, copy);
}
/** Notes what is said of a key; it must not be said otherwise. */
function note(known, key, said, message) {
  check(known.set(key, known.get(key) ?? said).get(key) === said, message);
}
/** Steps 9 to 11: final statements say one thing, each server has a statement, and all ends are those of one chain. */
export async function verifyHistory(statements, copies) {
  const finals = new Map(), ends = new Map(), hashes = new Map();
  const nameOf = ({ server, owner, period }) => canonical([server, owner, period]), stated = new Set(statements.map(nameOf));
  for (const one of statements) {
    const { at, head, kid, last, ...lasting } = one.says, name = nameOf(one);
    if (!one.provisional) note(finals, name, canonical(lasting), `two contents of the statement ${name} are signed`);
    for (const copy of copies) {
      const isStated = stated.has(nameOf({ ...one, server: copy.batch.server })) || !leafIn(one, copy);
      check(isStated, `${copy.receipt} is of ${copy.batch.server}, whose statement is missing: give it, or it was left out`);
    }
  }
  const hashOf = async (text) => hashes.get(text) ?? hashes.set(text, hex(await sha256(new TextEncoder().encode(text)))).get(text);
  const batches = await Promise.all(copies.map(async ({ batch }) =>
    ({ server: batch.server, head: { hash: await hashOf(canonical(batch)), number: batch.number }, last: batch.last })));
  for (const { server, head: { hash, number }, last } of [...statements, ...batches])
    note(ends, canonical([server, number]), canonical([hash, last]), `${server} ends in two ways with batch ${number}: its chain is forked`);
  const order = [...ends].map(([key, end]) => ({ of: JSON.parse(key), last: BigInt(JSON.parse(end)[1]) }));
  order.sort(({ of: [a, one] }, { of: [b, other] }) => (a === b ? Number(BigInt(one) - BigInt(other)) : a < b ? -1 : 1));
  const isLater = ({ of: [server], last }, at) => !at || order[at - 1].of[0] !== server || last > order[at - 1].last;
  check(order.every(isLater), "a later batch ends with an earlier receipt");
}
