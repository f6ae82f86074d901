-- 002 What a user said in a session, in the order it was said.
--
-- The owner stands on the child itself: policies compare one indexed column instead of running a
-- subquery per row, and the composite foreign key binds it to the parent's owner.

create table if not exists public.session_revisions (
  id uuid primary key default gen_random_uuid(),
  session_id uuid not null,
  user_id uuid not null default auth.uid(),
  content text not null,
  revision_type text not null,
  target_hole text,
  created_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp(),
  metadata jsonb not null default '{}'::jsonb,
  client jsonb not null default '{}'::jsonb,
  constraint valid_revision_type
    check (revision_type in ('initial', 'hole_fill', 'constraint_add', 'manual_edit')),
  constraint session_revisions_session_fkey
    foreign key (session_id, user_id) references public.sessions (id, user_id) on delete cascade
);

create index if not exists idx_revisions_session_id
  on public.session_revisions (session_id, user_id, created_at desc);
create index if not exists idx_revisions_user_id on public.session_revisions (user_id);

alter table public.session_revisions enable row level security;
