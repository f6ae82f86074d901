-- 015 The worker: who may work, what is left to do, and whether row-level security holds.
--
-- sync_lease_v1 lets one worker at a time work under a name; the lease is in the database, because
-- no scheduler is a mutex: a rolling deploy overlaps, and a run by hand is another app.
-- sync_settled_v1 tells of ranges of positions whether the server knows all of them.
-- sync_canary_v1 reads as a reserved user who owns nothing: whatever it sees, row-level security
-- let through.

-- p: {name, holder, seconds}; seconds 0 gives it back. A lease that ran out is anybody's; whoever
-- works on past it does no harm, since every transaction has its id.
create or replace function public.sync_lease_v1(p jsonb) returns jsonb
language plpgsql security invoker set search_path = '' set statement_timeout = '5s' as $$
declare
  v_name constant text := p ->> 'name';
  v_holder constant text := p ->> 'holder';
  v_seconds constant float8 := (p ->> 'seconds')::float8;
  v_lease sync.leases;
begin
  perform sync.guard();
  if v_name is null or v_holder is null or coalesce(v_seconds not between 0 and 86400, true) then
    perform sync.protocol_error('name, holder and seconds (0 to 86400) are required');
  end if;
  if v_seconds = 0 then
    delete from sync.leases l where l.name = v_name and l.holder = v_holder;
    return jsonb_build_object('held', false);
  end if;
  insert into sync.leases as l (name, holder, expires_at)
    values (v_name, v_holder, clock_timestamp() + make_interval(secs => v_seconds))
    on conflict (name) do update set holder = excluded.holder, expires_at = excluded.expires_at
      where l.holder = excluded.holder or l.expires_at < clock_timestamp();
  select l.* into v_lease from sync.leases l where l.name = v_name;
  return jsonb_build_object('held', v_lease.holder = v_holder,
    'expires_in_s', greatest(0, extract(epoch from v_lease.expires_at - clock_timestamp())));
end $$;

-- p: {ranges: [[log_id, first_seq, last_seq], …]}. A range is settled when each of its positions is
-- final or parked here; below a log's floor all are.
create or replace function public.sync_settled_v1(p jsonb) returns jsonb
language plpgsql stable security invoker set search_path = '' set statement_timeout = '20s' as $$
begin
  perform sync.guard();
  if jsonb_typeof(p -> 'ranges') is distinct from 'array' then
    perform sync.protocol_error('ranges is required');
  end if;
  return jsonb_build_object('settled', (
    select coalesce(jsonb_agg(r.last_seq < r.first_seq or r.last_seq - r.first_seq + 1 = (
        select count(*) from (
          select l.seq from sync.ledger l
            where l.log_id = r.log_id and l.seq between r.first_seq and r.last_seq
          union select q.seq from sync.parked q
            where q.log_id = r.log_id and q.seq between r.first_seq and r.last_seq
          union select a.seq from sync.aliases a
            where a.log_id = r.log_id and a.seq between r.first_seq and r.last_seq) s)
      order by r.number), '[]')
    from (
      select x.number, (x.range ->> 0)::uuid as log_id,
        greatest((x.range ->> 1)::bigint, coalesce(g.floor_seq, 0) + 1) as first_seq,
        (x.range ->> 2)::bigint as last_seq
      from jsonb_array_elements(p -> 'ranges') with ordinality x (range, number)
      left join sync.logs g on g.log_id = (x.range ->> 0)::uuid) r));
end $$;

-- Returns {visible: [tables of which the reader sees a row], checked: [tables that have any]}. The
-- reader owns nothing; a session of another reserved user makes sure that there is something to see.
create or replace function public.sync_canary_v1(p jsonb) returns jsonb
language plpgsql security invoker set search_path = '' set statement_timeout = '20s' as $$
declare
  v_reader constant uuid := '00000000-0000-4000-8000-0000000000c2';
  v_claims constant text := current_setting('request.jwt.claims', true);
  v_tables sync.tables[];
  v_table sync.tables;
  v_found boolean;
  v_checked text[] := '{}';
  v_visible text[] := '{}';
begin
  perform sync.guard();
  if to_regclass('public.sessions') is not null then
    insert into public.sessions (id, user_id, status, metadata) values (
      '00000000-0000-4000-8000-00000000ca9a', '00000000-0000-4000-8000-0000000000c1', 'abandoned',
      '{"purpose": "canary: nobody but its owner may see this row"}')
    on conflict (id) do nothing;
  end if;
  select coalesce(array_agg(t order by t.position), '{}') into v_tables from sync.tables t;
  foreach v_table in array v_tables loop
    execute format('select exists (select 1 from %I.%I)', v_table.schema_name, v_table.name)
      into v_found;
    if v_found then
      v_checked := v_checked || v_table.name;
    end if;
  end loop;
  perform sync.enter(v_reader, null);
  foreach v_table in array v_tables loop
    execute format('select exists (select 1 from %I.%I where %I is distinct from $1)',
      v_table.schema_name, v_table.name, v_table.owner_column) into v_found using v_reader;
    if v_found then
      v_visible := v_visible || v_table.name;
    end if;
  end loop;
  perform set_config('role', 'service_role', true);
  perform sync.leave(v_claims);
  return jsonb_build_object('checked', to_jsonb(v_checked), 'visible', to_jsonb(v_visible));
end $$;

revoke all on function
  public.sync_lease_v1(jsonb), public.sync_settled_v1(jsonb), public.sync_canary_v1(jsonb)
  from public, anon, authenticated;
grant execute on function
  public.sync_lease_v1(jsonb), public.sync_settled_v1(jsonb), public.sync_canary_v1(jsonb)
  to service_role;

notify pgrst, 'reload schema';
