-- 008 What the server remembers of deliveries, in a schema that the API doesn't expose.
--
--   sync.logs        one row per op log: the highest seq it is known to have acknowledged, and the
--                    floor up to which the ledger has been pruned
--   sync.ledger      one row per final transaction (applied, or discarded by a person), written in
--                    the same Postgres transaction as its effect; this is what makes delivery
--                    exactly once in effect
--   sync.aliases     positions of a log whose transaction came through another log before
--   sync.parked      transactions that a person or an event must free: dead, conflict, held behind
--                    one of these; superseded when their author deleted the row meanwhile
--   sync.conflicts   what both sides wanted of a row, and what was done; stays when it is resolved
--   sync.tombstones  which rows were deleted, and whose they were: "gone" told from "not yet there"
--   sync.leases      who of several workers may work
--   sync.tables      the allow-list: which tables may be written through the batch RPC, and which of
--                    their columns are identity, author, version, parent
--
-- A transaction's life: sent → its effect and its ledger row commit together → sent again after a
-- lost reply → found in the ledger → answered `duplicate` with the versions stored then. Refused by
-- the data or by a person's policy → parked by its sender → retried, edited, resolved or discarded
-- from anywhere → in the ledger after all.
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
-- How many final transactions at or below the floor were forgotten: audits go on counting them.
alter table sync.logs
  add column if not exists pruned_applied bigint not null default 0,
  add column if not exists pruned_discarded bigint not null default 0;

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
-- An edited transaction is discarded in favour of the one that replaces it.
alter table sync.ledger add column if not exists replaced_by uuid;
-- By key, the version that a merge had put the sender's changes of the row on: what its sender made
-- before that merge doesn't follow from it.
alter table sync.ledger add column if not exists met jsonb not null default '{}'::jsonb;
-- By key, what inserted rows had at once in the columns that their author left to the table; null:
-- nothing. Whoever lost the reply couldn't tell later what somebody else has changed there.
alter table sync.ledger add column if not exists defaults jsonb;
-- What a discarded transaction waited for: whatever its author wrote next waits for that in its stead.
alter table sync.ledger add column if not exists after jsonb not null default '[]'::jsonb;

create table if not exists sync.aliases (
  log_id uuid not null references sync.logs (log_id),
  seq bigint not null,
  txn_id uuid not null,
  recorded_at timestamptz not null default clock_timestamp(),
  primary key (log_id, seq)
);

create table if not exists sync.parked (
  log_id uuid not null references sync.logs (log_id),
  seq bigint not null,
  txn_id uuid not null,
  user_id uuid not null,
  digest text not null,
  state text not null,
  sqlstate text,
  op int,
  message text,
  blocked_by uuid,
  replaces uuid,
  -- The rows it writes and the parents of the rows it inserts, as `table/id`.
  keys text[] not null default '{}',
  -- The transaction as it was sent, with `before`: whoever holds it can merge and send it.
  item jsonb not null,
  attempts int not null default 1,
  parked_at timestamptz not null default clock_timestamp(),
  changed_at timestamptz not null default clock_timestamp(),
  primary key (log_id, seq),
  constraint parked_state check (state in ('dead', 'conflict', 'held', 'superseded'))
);
create index if not exists idx_parked_txn on sync.parked (txn_id);
create index if not exists idx_parked_keys on sync.parked using gin (keys);
create index if not exists idx_parked_user on sync.parked (user_id);

create table if not exists sync.conflicts (
  id uuid primary key default gen_random_uuid(),
  txn_id uuid not null,
  log_id uuid not null,
  seq bigint not null,
  user_id uuid not null,
  table_name text not null,
  row_id text not null,
  columns text[] not null default '{}',
  base jsonb,
  mine jsonb,
  theirs jsonb,
  theirs_version text,
  policy text not null,
  outcome text not null,
  note text,
  -- The last transaction of the author's chain that the record covers.
  through uuid,
  recorded_at timestamptz not null default clock_timestamp(),
  resolution text,
  resolved_at timestamptz,
  constraint conflicts_outcome check (outcome in ('merged', 'remote', 'local', 'manual', 'deleted')),
  constraint conflicts_resolution check (resolution in ('mine', 'theirs', 'edited', 'discarded'))
);
-- One record per row and outcome of a transaction, however often it is delivered. What a person has
-- decided is history: when the same row is met again after that, it is another conflict.
alter table sync.conflicts drop constraint if exists conflicts_once;
create unique index if not exists idx_conflicts_once
  on sync.conflicts (txn_id, user_id, table_name, row_id, outcome) where resolved_at is null;
create index if not exists idx_conflicts_txn on sync.conflicts (txn_id);
create index if not exists idx_conflicts_open on sync.conflicts (recorded_at)
  where outcome = 'manual' and resolved_at is null;

create table if not exists sync.tombstones (
  table_name text not null,
  row_id text not null,
  user_id uuid,
  deleted_at timestamptz not null default clock_timestamp(),
  primary key (table_name, row_id)
);

create table if not exists sync.leases (
  name text primary key,
  holder text not null,
  expires_at timestamptz not null
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

do $$
declare
  v_table text;
begin
  foreach v_table in array array[
    'logs', 'ledger', 'aliases', 'parked', 'conflicts', 'tombstones', 'leases', 'tables']
  loop
    execute format('alter table sync.%I enable row level security', v_table);
    execute format('revoke all on sync.%I from public, anon, authenticated', v_table);
    execute format('grant select on sync.%I to service_role', v_table);
    if v_table <> 'tables' then
      execute format('grant insert, update, delete on sync.%I to service_role', v_table);
    end if;
  end loop;
end $$;

-- A row that goes leaves its name behind, whoever deleted it and however: by the batch RPC, by a
-- cascade, by hand. Arguments: the registered name, the key column, the owner column. It writes
-- where the author may not, hence SECURITY DEFINER.
create or replace function sync.remember_deleted() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  execute format(
    'insert into sync.tombstones as t (table_name, row_id, user_id)'
    ' select %L, o.%I::text, o.%I from old_rows o'
    ' on conflict (table_name, row_id) do update'
    ' set user_id = excluded.user_id, deleted_at = clock_timestamp()',
    tg_argv[0], tg_argv[1], tg_argv[2]);
  return null;
end $$;
revoke all on function sync.remember_deleted() from public, anon, authenticated;

do $$
declare
  v_table text;
begin
  foreach v_table in array
    array['sessions', 'session_revisions', 'session_drafts', 'hole_resolutions']
  loop
    execute format(
      'create or replace trigger sync_remember_deleted after delete on public.%I'
      ' referencing old table as old_rows for each statement'
      ' execute function sync.remember_deleted(%L, ''id'', ''user_id'')', v_table, v_table);
  end loop;
end $$;

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
