PRAGMA journal_mode = WAL;
CREATE TABLE running (
    request TEXT PRIMARY KEY,
    registration TEXT NOT NULL,
    mark BLOB
) WITHOUT ROWID;
CREATE TABLE usage (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    request TEXT NOT NULL UNIQUE,
    registered_at INTEGER NOT NULL,
    ended_at INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    tenant TEXT NOT NULL,
    key_id TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    policy_version INTEGER NOT NULL,
    weights_epoch INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL
);
CREATE INDEX usage_ended_at ON usage (ended_at);
CREATE TABLE parts (
    sequence INTEGER NOT NULL REFERENCES usage,
    expert TEXT NOT NULL,
    owner TEXT,
    prompt_mass INTEGER NOT NULL,
    prompt_positions INTEGER NOT NULL,
    completion_mass INTEGER NOT NULL,
    completion_positions INTEGER NOT NULL,
    PRIMARY KEY (sequence, expert)
) WITHOUT ROWID;
INSERT INTO usage VALUES
    (1, 'dec_a', 5, 9, 'completed', 'proj_a', 'key_a', 'chat', 'tiny', 7, 3, 10, 1, 4),
    (3, 'dec_b', 6, 9, 'completed', 'proj_a', 'key_a', 'chat', 'tiny', 7, 3, 10, 1, 4);
INSERT INTO parts VALUES
    (1, 'news', 'gazette', 0, 0, 4, 4),
    (1, 'public', 'commons', 30, 10, 4, 4),
    (3, 'public', 'commons', 30, 10, 4, 4);
INSERT INTO running VALUES (
    'dec_c',
    '{"request":"dec_c","registered_at":7,"tenant":"proj_a","key_id":"key_a","endpoint":"chat","model":"tiny","policy_version":7,"weights_epoch":3,"experts":[[0,"public","commons",null,null],[1,"news","gazette","a-news",4]]}',
    '{"prompt_tokens":2,"cached_tokens":0,"completion_tokens":1,"prompt_2U":[2,0,2,0],"completion_2U":[1,1,1,1]}'
);
ALTER TABLE parts ADD COLUMN agreement TEXT;
ALTER TABLE parts ADD COLUMN agreement_version INTEGER;
ALTER TABLE parts ADD COLUMN share_ppm INTEGER NOT NULL DEFAULT 0;
UPDATE parts SET share_ppm = 105263, agreement = 'a-news', agreement_version = 4 WHERE expert = 'news';
UPDATE parts SET share_ppm = 894737 WHERE sequence = 1 AND expert = 'public';
UPDATE parts SET share_ppm = 1000000 WHERE sequence = 3;
ALTER TABLE usage ADD COLUMN prompt_sha256 TEXT;
ALTER TABLE usage ADD COLUMN answer_sha256 TEXT;
ALTER TABLE parts ADD COLUMN package TEXT;
PRAGMA application_id = 1179404120;
ALTER TABLE parts ADD COLUMN duties_sha256 TEXT;
CREATE TABLE ledger (id TEXT NOT NULL, whole_since INTEGER NOT NULL);
INSERT INTO ledger VALUES ('00000000000000000000000000000010', 0);
ALTER TABLE running RENAME TO former;
CREATE TABLE running (number INTEGER PRIMARY KEY, request TEXT NOT NULL, registration TEXT NOT NULL);
CREATE TABLE marks (number INTEGER PRIMARY KEY, mark BLOB NOT NULL);
INSERT INTO running (request, registration) SELECT request, registration FROM former ORDER BY request;
INSERT INTO marks SELECT number, mark FROM running JOIN former USING (request) WHERE mark IS NOT NULL;
DROP TABLE former;
CREATE TABLE corrections (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL,
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    request TEXT NOT NULL,
    at INTEGER NOT NULL,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL,
    amount TEXT,
    currency TEXT,
    dispute TEXT,
    UNIQUE (owner, kind, id),
    UNIQUE (owner, dispute)
);
CREATE INDEX corrections_owner ON corrections (owner, at);
CREATE TABLE experts (
    number INTEGER PRIMARY KEY,
    expert TEXT NOT NULL,
    owner TEXT,
    agreement TEXT,
    agreement_version INTEGER,
    package TEXT,
    duties_sha256 TEXT
);
CREATE INDEX experts_agreement ON experts (expert, agreement, agreement_version);
CREATE TABLE counts (
    sequence INTEGER NOT NULL REFERENCES usage,
    number INTEGER NOT NULL REFERENCES experts,
    prompt_mass INTEGER NOT NULL,
    prompt_positions INTEGER NOT NULL,
    completion_mass INTEGER NOT NULL,
    completion_positions INTEGER NOT NULL,
    share_ppm INTEGER NOT NULL,
    PRIMARY KEY (sequence, number)
) WITHOUT ROWID;
INSERT INTO experts (number, expert, owner, agreement, agreement_version) VALUES
    (1, 'news', 'gazette', 'a-news', 4),
    (2, 'public', 'commons', NULL, NULL);
INSERT INTO counts VALUES (1, 1, 0, 0, 4, 4, 105263), (1, 2, 30, 10, 4, 4, 894737), (3, 2, 30, 10, 4, 4, 1000000);
DROP TABLE parts;
CREATE VIEW parts AS SELECT sequence, expert, owner, agreement, agreement_version, package, duties_sha256,
    prompt_mass, prompt_positions, completion_mass, completion_positions, share_ppm
    FROM counts CROSS JOIN experts USING (number);
ALTER TABLE marks ADD COLUMN at INTEGER NOT NULL DEFAULT 0;
CREATE TABLE closings (
    owner TEXT NOT NULL,
    period TEXT NOT NULL,
    at INTEGER NOT NULL,
    actor TEXT NOT NULL,
    payouts TEXT NOT NULL,
    until INTEGER NOT NULL,
    PRIMARY KEY (owner, until)
) WITHOUT ROWID;
PRAGMA user_version = 10;
