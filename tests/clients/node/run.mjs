// Runs one path of one client: `node run.mjs openai.mjs tools`.
const [file, path] = process.argv.slice(2);
const client = await import(`./${file}`);
await client[path]();
