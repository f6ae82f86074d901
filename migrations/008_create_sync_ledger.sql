-- 008 What the server remembers of deliveries, in a schema that the API doesn't expose.
--
--   sync.logs     one row per op log: the highest seq it is known to have acknowledged
--   sync.ledger   one row per applied transaction, written in the same Postgres transaction as its
--                 effect; this is what makes delivery exactly once in effect
--   sync.tables   the allow-list: which tables may be written through the batch RPC, and which of
--                 their columns are identity, author, version, parent
--
-- A transaction's life: sent → its effect and its ledger row commit together → sent again after a
-- lost reply → found in the ledger → answered `duplicate` with the versions stored then.
-- Row-level security is on without a policy: only service_role, which bypasses it, gets in.

create schema if not exists sync;
revoke all on schema sync from public, anon, authenticated;
grant usage on schema sync to service_role;

create table if not exists sync.logs (
  log_id uuid primary key,
  acknowledged_seq bigint not null default 0,
  floor_seq bigint not null default 0,
  first_seen_at timestamptz not null default clock_timestamp(),
  last_seen_at timestamptz not null default clock_timestamp()
);

create table if not exists sync.ledger (
  txn_id uuid primary key,
  log_id uuid not null references sync.logs (log_id),
  seq bigint not null,
  user_id uuid not null,
  digest text not null,
  verdict text not null,
  versions jsonb not null default '{}'::jsonb,
  applied_at timestamptz not null default clock_timestamp(),
  constraint ledger_seq_positive check (seq > 0),
  constraint ledger_final_verdict check (verdict in ('applied', 'discarded')),
  constraint ledger_log_seq_key unique (log_id, seq)
);

create table if not exists sync.tables (
  name text primary key,
  position int not null,
  schema_name text not null default 'public',
  key_column text not null default 'id',
  key_type text not null default 'uuid',
  owner_column text not null default 'user_id',
  version_column text not null default 'updated_at',
  version_type text not null default 'timestamptz',
  parent_column text,
  parent_name text references sync.tables (name),
  server_owned text[] not null default '{}',
  constraint tables_position_key unique (position)
);

alter table sync.logs enable row level security;
alter table sync.ledger enable row level security;
alter table sync.tables enable row level security;
revoke all on sync.logs, sync.ledger, sync.tables from public, anon, authenticated;
grant select, insert, update, delete on sync.logs, sync.ledger to service_role;
grant select on sync.tables to service_role;

-- Parents before children: locks are taken in this order.
insert into sync.tables (name, position, parent_column, parent_name, server_owned) values
  ('sessions', 1, null, null, array[
    'created_at', 'current_ir', 'current_draft_version', 'revision_count', 'hole_count']),
  ('session_revisions', 2, 'session_id', 'sessions', array['created_at']),
  ('session_drafts', 3, 'session_id', 'sessions', array['created_at']),
  ('hole_resolutions', 4, 'session_id', 'sessions', array['created_at'])
on conflict (name) do update set
  position = excluded.position, parent_column = excluded.parent_column,
  parent_name = excluded.parent_name, server_owned = excluded.server_owned;
