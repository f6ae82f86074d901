-- 010 Reading as a user, the audit, and pruning: what workers and the API ask besides writing.
--
-- sync_read_v1 runs under the user's role and claims, so row-level security decides what is seen,
-- also when the user's own token has long expired. A read: {table, where, order_by, descending,
-- limit, columns, after, but, digest}. In `where` an array stands for any of its values, {"read": n}
-- for the keys that the n-th read finds, from 0; `after` names the order column and the key of the
-- row that the answer begins behind, `but` the keys that it leaves out. With `digest` the answer is
-- one row, {digest}: the SHA-256 of the sorted lines "key version" of what the read finds. Who has
-- the rows already needs none of them to know that they still stand. sync_audit_v1 tells what is remembered of each log's positions.
-- sync_prune_v1 forgets old final transactions and raises the floor over them.

-- Return a column's type, as a cast names it; an unknown column fails where it is compared.
create or replace function sync.type_of(p_table sync.tables, p_column text) returns text
language sql stable set search_path = '' as $$
  select coalesce((select format_type(a.atttypid, a.atttypmod) from pg_catalog.pg_attribute a
    where a.attname = p_column
      and a.attrelid = format('%I.%I', p_table.schema_name, p_table.name)::regclass), 'text')
$$;

-- Return the expression of the value that the reads $1 carry at a path, as a column has it.
create or replace function sync.given(p_table sync.tables, p_column text, variadic p_path text[])
returns text language sql stable set search_path = '' as $$
  select format('($1 #>> %L)::%s', p_path, sync.type_of(p_table, p_column))
$$;

-- Return what the n-th of the reads finds: what follows the columns in a SELECT from its table t.
create or replace function sync.found(p_reads jsonb, p_number int) returns text
language plpgsql stable set search_path = '' as $$
declare
  v_at constant text := p_number::text;
  v_read constant jsonb := p_reads -> p_number;
  v_table constant sync.tables := sync.table_of(v_read);
  v_key constant text := v_table.key_column;
  v_order constant text := coalesce(v_read ->> 'order_by', v_key);
  v_is_descending constant boolean := coalesce((v_read ->> 'descending')::boolean, false);
  v_where text;
begin
  -- Not IS NOT DISTINCT FROM, which covers null too but can't use an index.
  select coalesce(string_agg(case jsonb_typeof(w.value)
      when 'null' then format('t.%I is null', w.key)
      when 'array' then format(
        't.%1$I = any (array(select e::%2$s from jsonb_array_elements_text($1 #> %3$L) e))',
        w.key, sync.type_of(v_table, w.key), array[v_at, 'where', w.key])
      when 'object' then format('t.%I in (%s)', w.key,
        sync.keys_found(p_reads, (w.value ->> 'read')::int, p_number))
      else format('t.%1$I = %2$s', w.key, sync.given(v_table, w.key, v_at, 'where', w.key)) end,
      ' and '), 'true')
    into v_where from jsonb_each(coalesce(v_read -> 'where', '{}')) w;
  if jsonb_array_length(nullif(v_read -> 'but', 'null')) > 0 then
    v_where := v_where || format(
      ' and t.%1$I <> all (array(select e::%2$s from jsonb_array_elements_text($1 #> %3$L) e))',
      v_key, sync.type_of(v_table, v_key), array[v_at, 'but']);
  end if;
  if jsonb_typeof(v_read -> 'after') = 'object' then
    v_where := v_where || format(' and (t.%I, t.%I) %s (%s, %s)', v_order, v_key,
      case when v_is_descending then '<' else '>' end,
      sync.given(v_table, v_order, v_at, 'after', v_order),
      sync.given(v_table, v_key, v_at, 'after', v_key));
  end if;
  return format('from %I.%I t where %s order by t.%I %6$s, t.%5$I %6$s limit %7$s',
    v_table.schema_name, v_table.name, v_where, v_order, v_key,
    case when v_is_descending then 'desc' else 'asc' end,
    case when (v_read ->> 'digest')::boolean then format('($1 #>> %L)::int', array[v_at, 'limit'])
      -- A page of 1,000 and the row that tells of another one: at most some megabytes.
      else format('least(coalesce(($1 #>> %L)::int, 1000), 1001)', array[v_at, 'limit']) end);
end $$;

create or replace function sync.table_of(p_read jsonb) returns sync.tables
language plpgsql stable set search_path = '' as $$
declare
  v_table sync.tables;
begin
  select t.* into v_table from sync.tables t where t.name = p_read ->> 'table';
  if not found then
    perform sync.protocol_error('a read names a table that is not registered');
  end if;
  return v_table;
end $$;

-- Return the query of the keys that a read finds which comes before the one that refers to it.
create or replace function sync.keys_found(p_reads jsonb, p_number int, p_before int) returns text
language plpgsql stable set search_path = '' as $$
begin
  if p_number is null or p_number < 0 or p_number >= p_before then
    perform sync.protocol_error('a read refers to a read that does not come before it');
  end if;
  return format('select t.%I %s', (sync.table_of(p_reads -> p_number)).key_column,
    sync.found(p_reads, p_number));
end $$;

-- Return the query that answers the n-th of the reads.
create or replace function sync.answer(p_reads jsonb, p_number int) returns text
language plpgsql stable set search_path = '' as $$
declare
  v_read constant jsonb := p_reads -> p_number;
  v_table constant sync.tables := sync.table_of(v_read);
  v_found constant text := sync.found(p_reads, p_number);
  v_columns text;
begin
  if (v_read ->> 'digest')::boolean then
    return format(
      $sql$select jsonb_build_array(jsonb_build_object('digest', encode(sha256(convert_to(
        coalesce(string_agg(x.line, e'\n' order by x.line collate "C"), ''), 'UTF8')), 'hex')))
      from (select t.%I || ' ' || (to_jsonb(t.%I) #>> '{}') as line %s) x$sql$,
      v_table.key_column, v_table.version_column, v_found);
  end if;
  select coalesce(string_agg(format('t.%I', c), ', '), 't.*') into v_columns
    from jsonb_array_elements_text(nullif(v_read -> 'columns', 'null')) c;
  return format('select coalesce(jsonb_agg(to_jsonb(x)), ''[]'') from (select %s %s) x',
    v_columns, v_found);
end $$;

create or replace function public.sync_read_v1(p jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set timezone = 'UTC' set statement_timeout = '20s' as $$
declare
  v_user constant uuid := (p ->> 'user_id')::uuid;
  v_reads constant jsonb := p -> 'reads';
  v_queries text[] := '{}';
  v_query text;
  v_rows jsonb;
  v_answers jsonb[] := '{}';
  v_claims constant text := current_setting('request.jwt.claims', true);
begin
  perform sync.guard();
  if v_user is null or jsonb_typeof(v_reads) is distinct from 'array' then
    perform sync.protocol_error('user_id and reads are required');
  end if;
  for v_number in 0 .. jsonb_array_length(v_reads) - 1 loop
    v_queries := v_queries || sync.answer(v_reads, v_number);
  end loop;

  perform sync.enter(v_user, null);
  foreach v_query in array v_queries loop
    execute v_query into v_rows using v_reads;
    v_answers := v_answers || v_rows;
  end loop;
  perform set_config('role', 'service_role', true);
  perform sync.leave(v_claims);
  return jsonb_build_object('reads', to_jsonb(v_answers));
end $$;

-- What is remembered of each position of a log: {log_id, seq, txn_id, digest, user_id, state}. A
-- position that a transaction reached through another log has that transaction's state.
create or replace view sync.positions with (security_invoker = true) as
  select l.log_id, l.seq, l.txn_id, l.digest, l.user_id, l.verdict as state from sync.ledger l
  union all
  select p.log_id, p.seq, p.txn_id, p.digest, p.user_id, p.state from sync.parked p
  union all
  select a.log_id, a.seq, a.txn_id, coalesce(l.digest, p.digest), coalesce(l.user_id, p.user_id),
    coalesce(l.verdict, p.state, 'applied')  -- forgotten: only what was final is
  from sync.aliases a
  left join sync.ledger l on l.txn_id = a.txn_id
  left join sync.parked p on p.txn_id = a.txn_id and l.txn_id is null
    and (p.log_id, p.seq) = (select q.log_id, q.seq from sync.parked q
      where q.txn_id = a.txn_id order by q.parked_at limit 1);
revoke all on sync.positions from public, anon, authenticated;
grant select on sync.positions to service_role;

create or replace function public.sync_audit_v1(p jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set statement_timeout = '20s' as $$
declare
  v_log_id constant uuid := (p ->> 'log_id')::uuid;
  v_logs jsonb;
  v_entries jsonb;
begin
  perform sync.guard();
  select coalesce(jsonb_agg(to_jsonb(x) order by x.log_id), '[]') into v_logs from (
    select g.log_id, g.acknowledged_seq, g.floor_seq,
      count(*) filter (where s.state = 'applied') + g.pruned_applied as applied,
      count(*) filter (where s.state = 'discarded') + g.pruned_discarded as discarded,
      count(*) filter (where s.state = 'dead') as dead,
      count(*) filter (where s.state = 'conflict') as conflict,
      count(*) filter (where s.state = 'held') as held,
      count(*) filter (where s.state = 'superseded') as superseded,
      coalesce(max(s.seq), 0) as max_seq,
      -- Above zero only when a constraint of 008 is gone, or a transaction is in two places.
      count(s.seq) - least(count(distinct s.txn_id), count(distinct s.seq)) as duplicated
    from sync.logs g left join sync.positions s on s.log_id = g.log_id
    where v_log_id is null or g.log_id = v_log_id
    group by g.log_id) x;
  if v_log_id is null then
    return jsonb_build_object('logs', v_logs);
  end if;
  select coalesce(jsonb_agg(to_jsonb(x) order by x.seq), '[]') into v_entries from (
    select s.seq, s.txn_id, s.digest, s.user_id, s.state from sync.positions s
    where s.log_id = v_log_id and s.seq > coalesce((p ->> 'after_seq')::bigint, 0)
    order by s.seq
    limit least(coalesce((p ->> 'limit')::int, 5000), 5000)) x;  -- one reply stays below 2 MB
  return jsonb_build_object('logs', v_logs, 'entries', v_entries);
end $$;

-- Forget final transactions older than p.retention_s, log by log. The floor rises over an unbroken
-- run of final or parked positions only: a position still under way stops it, so that a late
-- transaction above the floor can always be told from one that was applied.
create or replace function public.sync_prune_v1(p jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set statement_timeout = '20s' as $$
declare
  v_before constant timestamptz :=
    clock_timestamp() - make_interval(secs => (p ->> 'retention_s')::float8);
  v_log sync.logs;
  v_floor bigint;
  v_applied bigint;
  v_discarded bigint;
  v_total bigint := 0;
begin
  perform sync.guard();
  if v_before is null or (p ->> 'retention_s')::float8 < 0 then
    perform sync.protocol_error('retention_s is required, in seconds');
  end if;
  for v_log in select g.* from sync.logs g order by g.log_id loop
    v_floor := sync.enter_log(v_log.log_id, 0);
    select v_floor + coalesce(min(x.n) filter (where x.seq - x.n <> v_floor or x.at > v_before) - 1,
        count(*)) into v_floor
      from (
        select s.seq, s.at, row_number() over (order by s.seq) as n from (
          select l.seq, l.applied_at as at from sync.ledger l where l.log_id = v_log.log_id
          union all select q.seq, q.parked_at from sync.parked q where q.log_id = v_log.log_id
          union all select a.seq, a.recorded_at from sync.aliases a where a.log_id = v_log.log_id) s
        where s.seq > v_floor
        order by s.seq limit 20000) x;  -- a call stays within its time; the next one goes on
    with gone as (
      delete from sync.ledger l where l.log_id = v_log.log_id and l.seq <= v_floor returning l.verdict)
    select count(*) filter (where verdict = 'applied'), count(*) filter (where verdict = 'discarded')
      into v_applied, v_discarded from gone;
    with gone as (
      delete from sync.aliases a where a.log_id = v_log.log_id and a.seq <= v_floor returning 1)
    select v_applied + count(*) into v_applied from gone;
    update sync.logs g set floor_seq = v_floor, pruned_applied = g.pruned_applied + v_applied,
        pruned_discarded = g.pruned_discarded + v_discarded
      where g.log_id = v_log.log_id and v_floor > g.floor_seq;
    v_total := v_total + v_applied + v_discarded;
  end loop;
  delete from sync.tombstones t where t.deleted_at < v_before;
  return jsonb_build_object('pruned', v_total);
end $$;

revoke all on function
  public.sync_read_v1(jsonb), public.sync_audit_v1(jsonb), public.sync_prune_v1(jsonb)
  from public, anon, authenticated;
grant execute on function
  public.sync_read_v1(jsonb), public.sync_audit_v1(jsonb), public.sync_prune_v1(jsonb)
  to service_role;

notify pgrst, 'reload schema';
