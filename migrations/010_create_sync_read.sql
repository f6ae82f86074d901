-- 010 Reading as a user, and the audit: what the trusted worker and the API ask besides writing.
--
-- sync_read_v1 runs under the user's role and claims, so row-level security decides what is seen,
-- also when the user's own token has long expired. sync_audit_v1 tells what the ledger knows.

create or replace function public.sync_read_v1(p jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set timezone = 'UTC' set statement_timeout = '20s' as $$
declare
  v_user constant uuid := (p ->> 'user_id')::uuid;
  v_read jsonb;
  v_table sync.tables;
  v_where text;
  v_queries text[] := '{}';
  v_query text;
  v_rows jsonb;
  v_answers jsonb[] := '{}';
  v_claims constant text := current_setting('request.jwt.claims', true);
begin
  perform sync.guard();
  if v_user is null or jsonb_typeof(p -> 'reads') is distinct from 'array' then
    perform sync.protocol_error('user_id and reads are required');
  end if;
  for v_read in select r from jsonb_array_elements(p -> 'reads') r loop
    select t.* into v_table from sync.tables t where t.name = v_read ->> 'table';
    if not found then
      perform sync.protocol_error('a read names a table that is not registered');
    end if;
    -- Not IS NOT DISTINCT FROM, which covers null too but can't use an index.
    select coalesce(string_agg(
        case when jsonb_typeof(w.value) = 'null' then format('t.%I is null', w.key)
          else format('t.%1$I = (f).%1$I', w.key) end, ' and '), 'true')
      into v_where from jsonb_each(coalesce(v_read -> 'where', '{}')) w;
    v_queries := v_queries || format(
      'select coalesce(jsonb_agg(to_jsonb(x)), ''[]'') from (select t.* from %1$I.%2$I t,'
      ' jsonb_populate_record(null::%1$I.%2$I, $1 -> ''where'') f where %3$s order by %4$s'
      ' limit least(coalesce(($1 ->> ''limit'')::int, 1000), 1000)) x',  -- hosted max_rows
      v_table.schema_name, v_table.name, v_where,
      case when v_read ->> 'order_by' is null then format('t.%I', v_table.key_column)
        else format('t.%1$I %2$s, t.%3$I %2$s', v_read ->> 'order_by',
          case when (v_read ->> 'descending')::boolean then 'desc' else 'asc' end,
          v_table.key_column) end);
  end loop;

  perform sync.enter(v_user, null);
  for i in 1 .. cardinality(v_queries) loop
    execute v_queries[i] into v_rows using p -> 'reads' -> (i - 1);
    v_answers := v_answers || v_rows;
  end loop;
  perform set_config('role', 'service_role', true);
  perform sync.leave(v_claims);
  return jsonb_build_object('reads', to_jsonb(v_answers));
end $$;

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
      count(l.txn_id) as ledger, coalesce(max(l.seq), 0) as max_seq,
      -- Both can only be above zero when a constraint of 008 is gone.
      count(l.txn_id) - least(count(distinct l.txn_id), count(distinct l.seq)) as duplicated
    from sync.logs g left join sync.ledger l on l.log_id = g.log_id
    where v_log_id is null or g.log_id = v_log_id
    group by g.log_id) x;
  if v_log_id is null then
    return jsonb_build_object('logs', v_logs);
  end if;
  select coalesce(jsonb_agg(to_jsonb(x) order by x.seq), '[]') into v_entries from (
    select l.seq, l.txn_id, l.digest, l.user_id, l.verdict from sync.ledger l
    where l.log_id = v_log_id and l.seq > coalesce((p ->> 'after_seq')::bigint, 0)
    order by l.seq
    limit least(coalesce((p ->> 'limit')::int, 5000), 5000)) x;  -- one reply stays below 2 MB
  return jsonb_build_object('logs', v_logs, 'entries', v_entries);
end $$;

revoke all on function public.sync_read_v1(jsonb), public.sync_audit_v1(jsonb)
  from public, anon, authenticated;
grant execute on function public.sync_read_v1(jsonb), public.sync_audit_v1(jsonb) to service_role;

notify pgrst, 'reload schema';
