-- 001 The sessions of prompt refinement: one row per session, owned by one user.
--
-- `updated_at` is the concurrency token: it moves only when a column that users own changes (006).
-- Derived columns never move it: current_ir and current_draft_version follow the draft that
-- current_draft_id names, the counters follow the children. `client` keeps verbatim what a client
-- sent and these columns can't hold, such as its own way of writing a timestamp.
-- On a hosted project user_id may reference auth.users(id); users of other identity providers have
-- a uuid5 of their id and no row there, so no foreign key is made here.

create table if not exists public.sessions (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null default auth.uid(),
  status text not null default 'active',
  source text not null default 'prompt',
  current_draft_id uuid,
  current_draft_version bigint not null default 0,
  current_ir jsonb,
  revision_count int not null default 0,
  hole_count int not null default 0,
  created_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp(),
  finalized_at timestamptz,
  metadata jsonb not null default '{}'::jsonb,
  client jsonb not null default '{}'::jsonb,
  constraint valid_status check (status in ('active', 'finalized', 'abandoned')),
  constraint valid_source check (source in ('prompt', 'reverse_mode')),
  -- Children reference (id, user_id), so that a child can't hang on somebody else's session.
  constraint sessions_id_user_key unique (id, user_id)
);

create index if not exists idx_sessions_user_status
  on public.sessions (user_id, status, updated_at desc);

alter table public.sessions enable row level security;
