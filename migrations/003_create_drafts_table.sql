-- 003 The drafts of a session: versioned snapshots of its intermediate representation.
--
-- (session_id, version) is not unique: ordinary traffic appends the same version again when a
-- filled hole is resolved once more, and two containers may make the same version unaware of each
-- other. Identity is the id.

create table if not exists public.session_drafts (
  id uuid primary key default gen_random_uuid(),
  session_id uuid not null,
  user_id uuid not null default auth.uid(),
  version bigint not null,
  ir jsonb not null,
  validation_status text not null,
  smt_results jsonb not null default '[]'::jsonb,
  ambiguities text[] not null default '{}',
  created_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp(),
  metadata jsonb not null default '{}'::jsonb,
  client jsonb not null default '{}'::jsonb,
  constraint valid_validation_status
    check (validation_status in ('pending', 'valid', 'contradictory', 'incomplete')),
  constraint session_drafts_session_fkey
    foreign key (session_id, user_id) references public.sessions (id, user_id) on delete cascade
);

create index if not exists idx_drafts_session_id
  on public.session_drafts (session_id, user_id, version desc);
create index if not exists idx_drafts_user_id on public.session_drafts (user_id);

alter table public.session_drafts enable row level security;
