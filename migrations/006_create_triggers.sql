-- 006 What the server derives: stamps, counters, the current draft.
--
-- Stamps. updated_at moves only when a column that users own changes, and strictly grows per row:
-- clock_timestamp(), not now(), because two updates in one transaction must get two tokens.
-- created_at is the moment the API accepted the write. Only the batch RPC knows it, and tells it in
-- the transaction-local setting sync.accepted_at, which no PostgREST client can set; it is capped
-- by the server's clock. Everybody else gets the server's clock, whatever they send.
--
-- Counters. Statement-level triggers add the delta of a whole statement (constant cost however many
-- children there are); the row lock of the UPDATE makes concurrent deltas add up.
--
-- The current draft. A session may be written before its draft in the same transaction, so the two
-- derived columns are filled from both sides: when a session names a draft, and when a draft that is
-- named arrives or changes.

create schema if not exists private;
revoke all on schema private from public, anon, authenticated;

-- Its name is a common one. A function of somebody else's under it serves other tables, and must
-- not be replaced under them.
do $$
begin
  if exists (select from pg_proc p where p.pronamespace = 'public'::regnamespace
      and p.proname = 'update_updated_at_column' and p.prosrc not like '%sync.accepted_at%') then
    raise exception 'public.update_updated_at_column() exists and is not ours'
      using errcode = '42723', hint = 'rename it and point your triggers to the new name';
  end if;
end $$;

create or replace function public.update_updated_at_column() returns trigger
language plpgsql set search_path = '' as $$
declare
  v_accepted_at timestamptz;
  v_authored record;
begin
  if tg_op = 'INSERT' then
    v_accepted_at := nullif(current_setting('sync.accepted_at', true), '')::timestamptz;
    if not isfinite(v_accepted_at) then
      raise exception 'accepted_at must be a finite time' using errcode = '22008';
    end if;
    new.created_at := least(coalesce(v_accepted_at, clock_timestamp()), clock_timestamp());
    new.updated_at := clock_timestamp();
    return new;
  end if;
  new.id := old.id;
  new.user_id := old.user_id;
  new.created_at := old.created_at;
  new.updated_at := old.updated_at;
  v_authored := new;
  if tg_relid = 'public.sessions'::regclass then
    v_authored.revision_count := old.revision_count;
    v_authored.hole_count := old.hole_count;
    v_authored.current_ir := old.current_ir;
    v_authored.current_draft_version := old.current_draft_version;
  end if;
  -- *<> compares the stored bytes: to `distinct`, 1 and 1.0 inside a jsonb are equal, and the change
  -- would go unnoticed. It also spares unpacking a large column that wasn't touched.
  if v_authored *<> old then
    new.updated_at := greatest(clock_timestamp(), old.updated_at + interval '1 microsecond');
  end if;
  return new;
end $$;

-- Derived columns of a session: whatever a client sends, they keep the values the server derived.
-- Our own triggers announce themselves by the transaction-local setting sync.deriving.
create or replace function public.derive_session_columns() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  v_draft record;
begin
  if current_setting('sync.deriving', true) = 'on' then
    return new;
  end if;
  if tg_op = 'INSERT' then
    new.revision_count := 0;
    new.hole_count := 0;
    new.current_ir := null;
    new.current_draft_version := 0;
  else
    new.revision_count := old.revision_count;
    new.hole_count := old.hole_count;
    new.current_ir := old.current_ir;
    new.current_draft_version := old.current_draft_version;
    if new.current_draft_id is not distinct from old.current_draft_id then
      return new;
    end if;
  end if;
  select d.ir, d.version into v_draft from public.session_drafts d
    where d.id = new.current_draft_id and d.session_id = new.id and d.user_id = new.user_id;
  new.current_ir := v_draft.ir;
  new.current_draft_version := coalesce(v_draft.version, 0);
  return new;
end $$;

create or replace function public.update_current_draft() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  v_drafts uuid[];
  v_sessions uuid[];
begin
  if tg_op = 'INSERT' then
    select array_agg(n.id), array_agg(n.session_id) into v_drafts, v_sessions from new_rows n;
  elsif tg_op = 'DELETE' then
    select array_agg(o.id), array_agg(o.session_id) into v_drafts, v_sessions from old_rows o;
  else
    select array_agg(x.id), array_agg(x.session_id) into v_drafts, v_sessions
      from (select n.id, n.session_id from new_rows n
            union select o.id, o.session_id from old_rows o) x;
  end if;
  -- Also when no session names these drafts: whoever is just about to name one waits for this lock,
  -- or is waited for, so one of the two sees the other's row.
  perform 1 from public.sessions s where s.id = any (v_sessions) order by s.id for no key update;
  perform set_config('sync.deriving', 'on', true);
  -- A draft that is gone, or hangs on another session now, leaves nothing behind.
  update public.sessions s
    set current_ir = d.ir, current_draft_version = coalesce(d.version, 0)
    from unnest(v_drafts, v_sessions) x (draft_id, session_id)
    left join public.session_drafts d on d.id = x.draft_id and d.session_id = x.session_id
    where s.id = x.session_id and s.current_draft_id = x.draft_id;
  perform set_config('sync.deriving', '', true);
  return null;
end $$;

create or replace function public.update_revision_count() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform set_config('sync.deriving', 'on', true);
  -- A statement over several sessions takes them in one order, or two of them deadlock.
  if tg_op = 'INSERT' then
    perform 1 from public.sessions s where s.id in (select r.session_id from new_rows r)
      order by s.id for no key update;
    update public.sessions s set revision_count = s.revision_count + d.n
      from (select r.session_id, count(*)::int as n from new_rows r group by 1) d
      where s.id = d.session_id;
  elsif tg_op = 'DELETE' then
    perform 1 from public.sessions s where s.id in (select r.session_id from old_rows r)
      order by s.id for no key update;
    update public.sessions s set revision_count = s.revision_count - d.n
      from (select r.session_id, count(*)::int as n from old_rows r group by 1) d
      where s.id = d.session_id;
  else  -- a child that moved to another session
    perform 1 from public.sessions s
      where s.id in (select r.session_id from new_rows r union select r.session_id from old_rows r)
      order by s.id for no key update;
    update public.sessions s set revision_count = s.revision_count + d.n
      from (select x.session_id, sum(x.n)::int as n
            from (select r.session_id, 1 as n from new_rows r
                  union all
                  select r.session_id, -1 from old_rows r) x
            group by 1 having sum(x.n) <> 0) d
      where s.id = d.session_id;
  end if;
  perform set_config('sync.deriving', '', true);
  return null;
end $$;

create or replace function public.update_hole_count() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform set_config('sync.deriving', 'on', true);
  -- A statement over several sessions takes them in one order, or two of them deadlock.
  if tg_op = 'INSERT' then
    perform 1 from public.sessions s where s.id in (select r.session_id from new_rows r)
      order by s.id for no key update;
    update public.sessions s set hole_count = s.hole_count + d.n
      from (select r.session_id, count(*)::int as n
            from new_rows r where not r.applied group by 1) d
      where s.id = d.session_id;
  elsif tg_op = 'DELETE' then
    perform 1 from public.sessions s where s.id in (select r.session_id from old_rows r)
      order by s.id for no key update;
    update public.sessions s set hole_count = s.hole_count - d.n
      from (select r.session_id, count(*)::int as n
            from old_rows r where not r.applied group by 1) d
      where s.id = d.session_id;
  else
    perform 1 from public.sessions s
      where s.id in (select r.session_id from new_rows r union select r.session_id from old_rows r)
      order by s.id for no key update;
    update public.sessions s set hole_count = s.hole_count + d.n
      from (select x.session_id, sum(x.n)::int as n
            from (select r.session_id, 1 as n from new_rows r where not r.applied
                  union all
                  select r.session_id, -1 from old_rows r where not r.applied) x
            group by 1 having sum(x.n) <> 0) d
      where s.id = d.session_id;
  end if;
  perform set_config('sync.deriving', '', true);
  return null;
end $$;

revoke all on function
  public.update_updated_at_column(), public.derive_session_columns(), public.update_current_draft(),
  public.update_revision_count(), public.update_hole_count()
  from public, anon, authenticated, service_role;

-- Triggers of one table and kind fire in the order of their names: derive first, then stamp.
create or replace trigger derive_session_columns before insert or update on public.sessions
  for each row execute function public.derive_session_columns();
create or replace trigger update_sessions_updated_at before insert or update on public.sessions
  for each row execute function public.update_updated_at_column();
create or replace trigger update_revisions_updated_at
  before insert or update on public.session_revisions
  for each row execute function public.update_updated_at_column();
create or replace trigger update_drafts_updated_at before insert or update on public.session_drafts
  for each row execute function public.update_updated_at_column();
create or replace trigger update_resolutions_updated_at
  before insert or update on public.hole_resolutions
  for each row execute function public.update_updated_at_column();

drop trigger if exists derive_from_draft on public.session_drafts;  -- saw neither delete nor move
drop function if exists public.derive_from_draft();
create or replace trigger update_sessions_current_draft after insert on public.session_drafts
  referencing new table as new_rows
  for each statement execute function public.update_current_draft();
create or replace trigger update_sessions_current_draft_upd after update on public.session_drafts
  referencing old table as old_rows new table as new_rows
  for each statement execute function public.update_current_draft();
create or replace trigger update_sessions_current_draft_del after delete on public.session_drafts
  referencing old table as old_rows
  for each statement execute function public.update_current_draft();

create or replace trigger update_sessions_revision_count after insert on public.session_revisions
  referencing new table as new_rows
  for each statement execute function public.update_revision_count();
create or replace trigger update_sessions_revision_count_upd
  after update on public.session_revisions
  referencing old table as old_rows new table as new_rows
  for each statement execute function public.update_revision_count();
create or replace trigger update_sessions_revision_count_del
  after delete on public.session_revisions
  referencing old table as old_rows
  for each statement execute function public.update_revision_count();
create or replace trigger update_sessions_hole_count_ins after insert on public.hole_resolutions
  referencing new table as new_rows
  for each statement execute function public.update_hole_count();
create or replace trigger update_sessions_hole_count_upd after update on public.hole_resolutions
  referencing old table as old_rows new table as new_rows
  for each statement execute function public.update_hole_count();
create or replace trigger update_sessions_hole_count_del after delete on public.hole_resolutions
  referencing old table as old_rows
  for each statement execute function public.update_hole_count();
