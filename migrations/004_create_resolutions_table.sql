-- 004 The answers to holes. A hole may be answered more than once; every answer stays.

create table if not exists public.hole_resolutions (
  id uuid primary key default gen_random_uuid(),
  session_id uuid not null,
  user_id uuid not null default auth.uid(),
  hole_id text not null,
  resolution_text text not null,
  resolution_type text not null,
  applied boolean not null default false,
  created_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp(),
  applied_at timestamptz,
  metadata jsonb not null default '{}'::jsonb,
  client jsonb not null default '{}'::jsonb,
  constraint valid_resolution_type check (
    resolution_type in ('clarify_intent', 'add_constraint', 'refine_signature', 'specify_effect')
  ),
  constraint hole_resolutions_session_fkey
    foreign key (session_id, user_id) references public.sessions (id, user_id) on delete cascade
);

create index if not exists idx_resolutions_session_id
  on public.hole_resolutions (session_id, user_id);
create index if not exists idx_resolutions_user_id on public.hole_resolutions (user_id);

alter table public.hole_resolutions enable row level security;
