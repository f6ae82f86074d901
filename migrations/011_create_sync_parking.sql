-- 011 Parked work: what a person or an event must free, and how they do it from anywhere.
--
--   sync_park_v1            the sender hands over what was refused, what is in conflict, and what
--                           waits behind either; its own copy is settled only by this reply
--   sync_list_parked_v1     what is parked; sync_list_conflicts_v1: the conflict records
--   sync_retry_v1           try again as it is, then what waited for it
--   sync_edit_v1            discard it in favour of a new transaction with other content
--   sync_discard_v1         give it up; what waited for it is linked to what it waited for
--   sync_resolve_v1         decide a conflict: mine, theirs, or an edited row
--
-- A parked transaction is in exactly one place: it leaves sync.parked in the same Postgres
-- transaction that puts it into the ledger, as applied or as discarded. Edited transactions come from
-- people, not from a buffer, so they live in a log of their own, sync.people().
-- Everything takes effect as the author, never as the operator. Only service_role may call.

-- The log of what people write when they mend things.
create or replace function sync.people() returns uuid
language sql immutable set search_path = '' as $$
  select '70656f70-6c65-4000-8000-000000000000'::uuid
$$;

create or replace function sync.next_people_seq() returns bigint
language plpgsql set search_path = '' as $$
declare
  v_seq bigint;
begin
  perform sync.enter_log(sync.people(), 0);
  update sync.logs set acknowledged_seq = acknowledged_seq + 1
    where log_id = sync.people() returning acknowledged_seq into v_seq;
  return v_seq;
end $$;

-- The rows a transaction writes and the parents of the rows it inserts.
create or replace function sync.keys_for(p_ops jsonb) returns text[]
language sql stable set search_path = '' as $$
  select coalesce(array_agg(distinct k), '{}') from (
    select (o ->> 'table') || '/' || (o ->> 'id') as k from jsonb_array_elements(p_ops) o
    union all
    select t.parent_name || '/' || (o -> 'values' ->> t.parent_column)
      from jsonb_array_elements(p_ops) o join sync.tables t on t.name = o ->> 'table') x
  where k is not null
$$;

create or replace function sync.park(
  p_log_id uuid, p_item jsonb, p_cause jsonb
) returns void language sql set search_path = '' as $$
  insert into sync.parked (log_id, seq, txn_id, user_id, digest, state, sqlstate, op, message,
      blocked_by, replaces, keys, item)
    values (p_log_id, (p_item ->> 'seq')::bigint, (p_item ->> 'txn_id')::uuid,
      (p_item ->> 'user_id')::uuid, p_item ->> 'digest', p_cause ->> 'state',
      p_cause ->> 'sqlstate', (p_cause ->> 'op')::int, p_cause ->> 'message',
      (p_cause ->> 'blocked_by')::uuid, (p_item ->> 'replaces')::uuid,
      sync.keys_for(p_item -> 'ops'), p_item)
$$;

create or replace function sync.park_one(
  p_log_id uuid, p_floor bigint, p_park jsonb
) returns jsonb language plpgsql set search_path = '' as $$
declare
  v_item constant jsonb := sync.with_successors(p_park -> 'transaction');
  v_seq constant bigint := (v_item ->> 'seq')::bigint;
  v_known jsonb := sync.known(p_log_id, v_item, false);
begin
  if v_known ->> 'verdict' in ('duplicate', 'parked') then
    return v_known;
  elsif sync.seq_taken(p_log_id, v_seq) then
    return jsonb_build_object('verdict', 'rejected', 'sqlstate', 'SYT02',
      'message', 'this seq of the log was used by another transaction');
  elsif p_park ->> 'state' = 'held' and not exists (
      select from sync.parked p
        where p.txn_id in (select a::uuid from jsonb_array_elements_text(v_item -> 'after') a)
          and p.state <> 'superseded') then
    return jsonb_build_object('verdict', 'held', 'blocked_by', p_park ->> 'blocked_by',
      'message', 'what it waited for is decided; send it again');
  end if;
  perform sync.park(p_log_id, v_item, p_park);
  perform sync.record_conflicts(p_log_id, v_item, p_park -> 'records');
  if v_seq <= p_floor then
    -- The floor counted this position as final; from now on it counts as parked.
    update sync.logs set pruned_applied = greatest(0, pruned_applied - 1) where log_id = p_log_id;
  end if;
  return jsonb_build_object('verdict', 'parked', 'state', p_park ->> 'state');
end $$;

create or replace function public.sync_park_v1(p jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set timezone = 'UTC' set statement_timeout = '20s' set lock_timeout = '3s' as $$
declare
  v_log_id constant uuid := (p ->> 'log_id')::uuid;
  v_floor bigint;
  v_park jsonb;
  v_verdicts jsonb[] := '{}';
  v_claims constant text := current_setting('request.jwt.claims', true);
begin
  perform sync.guard();
  if v_log_id is null or jsonb_typeof(p -> 'parks') is distinct from 'array' then
    perform sync.protocol_error('log_id and parks are required');
  end if;
  v_floor := sync.enter_log(v_log_id, (p ->> 'acknowledged_seq')::bigint);
  for v_park in select x from jsonb_array_elements(p -> 'parks') x loop
    v_verdicts := v_verdicts || sync.complete(
      v_park -> 'transaction', sync.park_one(v_log_id, v_floor, v_park));
  end loop;
  perform sync.leave(v_claims);
  return jsonb_build_object('verdicts', to_jsonb(v_verdicts));
end $$;

-- What differs between what the author knew of a row and what stands there, in columns that the op
-- sets otherwise: {columns, base, mine, theirs}; null when nothing does. Compared as the row's own
-- types, so that the spelling of a timestamp doesn't count.
create or replace function sync.overlap_of(p_op jsonb, p_before jsonb, p_row jsonb) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  v_table sync.tables;
  v_base jsonb;
  v_mine jsonb;
  v_columns text[];
begin
  select t.* into v_table from sync.tables t where t.name = p_op ->> 'table';
  if p_row is null or p_op ->> 'kind' = 'delete' then
    select array_agg(k order by k) into v_columns from jsonb_object_keys(p_op -> 'values') k;
    v_base := coalesce(nullif(p_before, 'null'), '{}');
    v_mine := p_op -> 'values';
  else
    execute format('select to_jsonb(jsonb_populate_record(null::%1$I.%2$I, $1)),'
      ' to_jsonb(jsonb_populate_record(null::%1$I.%2$I, $2))', v_table.schema_name, v_table.name)
      into v_base, v_mine using coalesce(nullif(p_before, 'null'), '{}'), p_op -> 'values';
    select array_agg(k order by k) into v_columns from jsonb_object_keys(p_op -> 'values') k
      where (p_op ->> 'kind' = 'insert' or v_base -> k is distinct from p_row -> k)
        and v_mine -> k is distinct from p_row -> k;
    if v_columns is null then
      return null;
    end if;
  end if;
  return jsonb_build_object('columns', coalesce(v_columns, '{}'),
    'base', (select jsonb_object_agg(c, v_base -> c) from unnest(v_columns) c),
    'mine', (select jsonb_object_agg(c, v_mine -> c) from unnest(v_columns) c),
    'theirs', (select jsonb_object_agg(c, p_row -> c) from unnest(v_columns) c
      where p_row is not null));
end $$;

-- Give ops on some rows a base: {key: version}. A row without a version there gets none. What waits
-- behind it knew other ground (`met`, 013), and must meet the row by itself.
create or replace function sync.rebase_item(p_item jsonb, p_versions jsonb) returns jsonb
language sql immutable set search_path = '' as $$
  select p_item || jsonb_build_object(
      'met', coalesce(p_item -> 'met', '{}') || jsonb_strip_nulls(p_versions),
      'ops', coalesce(jsonb_agg(
      case when p_versions ? ((o ->> 'table') || '/' || (o ->> 'id')) and o ->> 'kind' <> 'insert'
        then o || jsonb_build_object('base', p_versions -> ((o ->> 'table') || '/' || (o ->> 'id')))
        else o end order by n), '[]'))
    from jsonb_array_elements(p_item -> 'ops') with ordinality x (o, n)
$$;

create or replace function sync.on_its_way(p_txn_id uuid) returns boolean
language sql stable set search_path = '' as $$
  select p_txn_id is not null
    and not exists (select from sync.parked q where q.txn_id = p_txn_id)
    and not exists (select from sync.ledger l where l.txn_id = p_txn_id)
$$;

-- Where a parked transaction stands in its author's order; an edited one where the first of its line did.
create or replace function sync.place_of(p_parked sync.parked, out log_id uuid, out seq bigint)
language sql immutable set search_path = '' as $$
  select coalesce(p_parked.item -> 'stands_for' ->> 0, p_parked.log_id::text)::uuid,
    coalesce((p_parked.item -> 'stands_for' ->> 1)::bigint, p_parked.seq)
$$;

-- What the author of a parked transaction wrote after it and is parked too, with its position.
create or replace function sync.parked_behind(
  p_parked sync.parked, out waiting sync.parked, out seq bigint
) returns setof record language sql stable set search_path = '' as $$
  select w, x.seq from sync.place_of(p_parked) y, sync.parked w, sync.place_of(w) x
    where w.user_id = p_parked.user_id and w.state <> 'superseded'
      and x.log_id = y.log_id and x.seq > y.seq
$$;

-- The last position in its log that a record of a parked transaction covers: up to where its container
-- had merged, or all that is parked when that one is still on its way, because what comes behind a
-- waiting change is never parked before it.
create or replace function sync.covered_through(p_parked sync.parked, p_through uuid) returns bigint
language sql stable set search_path = '' as $$
  select coalesce(
    (select x.seq from sync.parked q, sync.place_of(q) x
      where q.txn_id = p_through and x.log_id = y.log_id),
    (select l.seq from sync.ledger l where l.txn_id = p_through and l.log_id = y.log_id),
    case when sync.on_its_way(p_through) then 9223372036854775807 else y.seq end)
  from sync.place_of(p_parked) y
$$;

-- A newer record of a row in the place of an undecided older one, which also covers what waits behind:
-- that was merged with the row that the older one was about, and asks nothing more. What only the
-- older one disputes is told of for as long as a covered change sets it otherwise than the row has it
-- (or deletes the row, or one is still on its way), and mine is what the covered changes come to.
-- `p_ops` are theirs, in order.
create or replace function sync.carry_over(
  p_record jsonb, p_older sync.conflicts, p_ops jsonb, p_row jsonb
) returns jsonb language plpgsql stable set search_path = '' as $$
declare
  v_names jsonb := p_record -> 'columns';
  v_base jsonb := coalesce(nullif(p_record -> 'base', 'null'), '{}');
  v_mine jsonb := coalesce(nullif(p_record -> 'mine', 'null'), '{}');
  v_theirs jsonb := coalesce(nullif(p_record -> 'theirs', 'null'), '{}');
  v_deletes constant boolean := exists (select from jsonb_array_elements(p_ops) o
    where o ->> 'table' = p_older.table_name and o ->> 'id' = p_older.row_id
      and o ->> 'kind' = 'delete');
  v_more constant boolean := sync.on_its_way(p_older.through);
  v_name text;
  v_path text[];
  v_last jsonb;
begin
  for v_name in
    select c from jsonb_array_elements_text(v_names) c union select unnest(p_older.columns)
  loop
    v_path := array[split_part(v_name, '.', 1)];
    if v_name <> v_path[1] then
      v_path := v_path || substr(v_name, length(v_path[1]) + 2);
    end if;
    select o -> 'values' #> v_path into v_last
      from jsonb_array_elements(p_ops) with ordinality x (o, n)
      where o ->> 'table' = p_older.table_name and o ->> 'id' = p_older.row_id
        and o -> 'values' #> v_path is not null
      order by n desc limit 1;
    if not v_names ? v_name then
      continue when v_names ? v_path[1] or (not v_more and case when v_last is null
        then not v_deletes else v_last is not distinct from p_row #> v_path end);
      v_names := v_names || to_jsonb(v_name);
      v_base := v_base || jsonb_build_object(v_name, p_older.base -> v_name);
      if p_row is not null then
        v_theirs := v_theirs || jsonb_build_object(v_name, p_row #> v_path);
      end if;
    end if;
    if v_more and p_older.mine ? v_name then
      v_last := p_older.mine -> v_name;
    end if;
    if v_last is not null then
      v_mine := v_mine || jsonb_build_object(v_name, v_last);
    end if;
  end loop;
  return p_record || jsonb_build_object('through', p_older.through, 'base', v_base, 'mine', v_mine,
    'theirs', v_theirs, 'columns', coalesce((select jsonb_agg(c order by c)
      from jsonb_array_elements_text(v_names) c), '[]'));
end $$;

-- Bring the undecided records of a parked transaction's rows up to date with what it has met now. Where
-- it changes a row twice, the second record takes the first one over.
create or replace function sync.renew_records(
  p_parked sync.parked, p_records jsonb, p_rows jsonb
) returns void language plpgsql set search_path = '' as $$
declare
  v_record jsonb;
  v_older sync.conflicts;
  v_ops jsonb;
begin
  for v_record in select r from jsonb_array_elements(p_records) r loop
    delete from sync.conflicts c
      where c.txn_id = p_parked.txn_id and c.user_id = p_parked.user_id and c.outcome = 'manual'
        and c.resolved_at is null
        and c.table_name = v_record ->> 'table' and c.row_id = v_record ->> 'id'
      returning c.* into v_older;
    if found then
      select p_parked.item -> 'ops' || coalesce(jsonb_agg(o order by b.seq, n), '[]') into v_ops
        from sync.parked_behind(p_parked) b,
          jsonb_array_elements((b.waiting).item -> 'ops') with ordinality x (o, n)
        where b.seq <= sync.covered_through(p_parked, v_older.through);
      v_record := sync.carry_over(v_record, v_older, v_ops,
        nullif(p_rows -> (v_older.table_name || '/' || v_older.row_id), 'null'));
    end if;
    perform sync.record_conflicts(p_parked.log_id, p_parked.item, jsonb_build_array(v_record));
  end loop;
end $$;

-- A parked transaction met rows that moved: what only one side changed is merged, the rest becomes
-- (or stays) a record. An op that a person's `theirs` has left empty goes when the row has gone, with
-- its `before`: there is nothing to decide about. Returns the rebased item, or null when a person must look.
create or replace function sync.merge_parked(p_parked sync.parked, p_rows jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
  v_op jsonb;
  v_n int;
  v_key text;
  v_overlap jsonb;
  v_table sync.tables;
  v_records jsonb := '[]';
  v_versions jsonb := '{}';
  v_ops jsonb := '[]';
  v_before jsonb := '[]';
begin
  for v_op, v_n in
    select o, n from jsonb_array_elements(p_parked.item -> 'ops') with ordinality x (o, n)
  loop
    v_key := (v_op ->> 'table') || '/' || (v_op ->> 'id');
    continue when v_op ->> 'kind' = 'update' and v_op -> 'values' = '{}'
      and p_rows -> v_key = 'null';
    v_ops := v_ops || jsonb_build_array(v_op);
    v_before := v_before || jsonb_build_array(p_parked.item -> 'before' -> (v_n - 1));
    continue when not p_rows ? v_key;
    select t.* into v_table from sync.tables t where t.name = v_op ->> 'table';
    v_overlap := sync.overlap_of(v_op, p_parked.item -> 'before' -> (v_n - 1),
      nullif(p_rows -> v_key, 'null'));
    if v_overlap is null then
      v_versions := v_versions || jsonb_build_object(
        v_key, p_rows -> v_key -> v_table.version_column);
    else
      v_records := v_records || jsonb_build_array(v_overlap || jsonb_build_object(
        'table', v_op ->> 'table', 'id', v_op ->> 'id', 'policy', 'manual', 'outcome', 'manual',
        'theirs_version', p_rows -> v_key -> v_table.version_column));
    end if;
  end loop;
  if v_records = '[]' and (v_versions <> '{}' or v_ops <> p_parked.item -> 'ops') then
    return sync.rebase_item(
      p_parked.item || jsonb_build_object('ops', v_ops, 'before', v_before), v_versions);
  end if;
  perform sync.renew_records(p_parked, v_records, p_rows);
  return null;
end $$;

-- Try a parked transaction again, then what waits for it. Returns its verdict, and adds each one
-- tried to p_results.
create or replace function sync.retry_one(
  p_log_id uuid, p_seq bigint, inout p_results jsonb
) language plpgsql set search_path = '' as $$
declare
  v_parked sync.parked;
  v_waiting record;
  v_verdict jsonb;
  v_merged jsonb;
begin
  select p.* into v_parked from sync.parked p
    where p.log_id = p_log_id and p.seq = p_seq and p.state <> 'superseded' for update;
  if not found then
    return;
  end if;
  for v_tries in 1 .. 2 loop
    v_verdict := sync.apply_transaction(p_log_id, null, v_parked.item, '{}');
    exit when v_verdict ->> 'verdict' <> 'conflict';
    v_merged := sync.merge_parked(v_parked, v_verdict -> 'rows');
    exit when v_merged is null;
    v_parked.item := v_merged;
  end loop;
  p_results := p_results || jsonb_build_array(sync.complete(v_parked.item, v_verdict));
  if v_verdict ->> 'verdict' in ('applied', 'duplicate') then
    delete from sync.parked p where p.log_id = p_log_id and p.seq = p_seq;
    -- What applied after all needs no decision any more; a decision under way says which it was.
    update sync.conflicts c set resolution = 'mine', resolved_at = clock_timestamp()
      where c.txn_id = v_parked.txn_id and c.user_id = v_parked.user_id and c.outcome = 'manual'
        and c.resolved_at is null;
    for v_waiting in select p.log_id, p.seq from sync.parked p
        where p.state in ('dead', 'held') and p.item -> 'after' ? v_parked.txn_id::text
        order by p.log_id, p.seq loop
      p_results := sync.retry_one(v_waiting.log_id, v_waiting.seq, p_results);
    end loop;
    return;
  end if;
  update sync.parked p set
      item = v_parked.item, attempts = p.attempts + 1, changed_at = clock_timestamp(),
      -- Held by nobody who is parked means that only a person can help.
      state = case when v_verdict ->> 'verdict' = 'conflict' then 'conflict'
        when v_verdict ->> 'blocked_by' is not null then 'held' else 'dead' end,
      sqlstate = v_verdict ->> 'sqlstate', op = (v_verdict ->> 'op')::int,
      message = v_verdict ->> 'message', blocked_by = (v_verdict ->> 'blocked_by')::uuid
    where p.log_id = p_log_id and p.seq = p_seq;
end $$;

-- Everything a retry may touch is locked first, in the order that batches use.
create or replace function sync.lock_parked(p_txn_ids uuid[]) returns void
language plpgsql set search_path = '' as $$
declare
  v_log_id uuid;
begin
  for v_log_id in select distinct p.log_id from sync.parked p
      where p.txn_id = any (p_txn_ids) order by 1 loop
    perform sync.enter_log(v_log_id, 0);
  end loop;
  perform sync.lock_rows(coalesce(
    (select jsonb_agg(p.item) from sync.parked p where p.txn_id = any (p_txn_ids)), '[]'));
end $$;

create or replace function public.sync_retry_v1(p jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set timezone = 'UTC' set statement_timeout = '20s' set lock_timeout = '3s' as $$
declare
  v_txn_ids constant uuid[] := array(select x::uuid from jsonb_array_elements_text(p -> 'txn_ids') x);
  v_one record;
  v_results jsonb := '[]';
  v_claims constant text := current_setting('request.jwt.claims', true);
begin
  perform sync.guard();
  perform sync.lock_parked(v_txn_ids);
  for v_one in select q.* from sync.parked q
      where q.txn_id = any (v_txn_ids) order by q.log_id, q.seq loop
    continue when v_results @> jsonb_build_array(jsonb_build_object('txn_id', v_one.txn_id));
    if v_one.state = 'conflict' then
      -- It was rebased on the row it met: tried as it is, it would overwrite theirs undecided.
      v_results := v_results || jsonb_build_array(sync.complete(v_one.item,
        '{"verdict": "conflict", "message": "a person must decide its conflict first"}'));
      continue;
    end if;
    v_results := sync.retry_one(v_one.log_id, v_one.seq, v_results);
  end loop;
  perform sync.leave(v_claims);
  return jsonb_build_object('results', v_results);
end $$;

-- Put a parked transaction into the ledger as discarded. Its position stays accounted for; also when
-- it was refused because its txn_id is in the ledger with other content.
create or replace function sync.discard(p_parked sync.parked, p_replaced_by uuid) returns void
language plpgsql set search_path = '' as $$
begin
  insert into sync.ledger
      (txn_id, log_id, seq, user_id, digest, verdict, versions, replaced_by, after)
    values (p_parked.txn_id, p_parked.log_id, p_parked.seq, p_parked.user_id, p_parked.digest,
      'discarded', sync.row_keys(p_parked.item -> 'ops'), p_replaced_by,
      coalesce(p_parked.item -> 'after', '[]'))
    on conflict (txn_id) do nothing;
  if not found then
    insert into sync.aliases (log_id, seq, txn_id)
      values (p_parked.log_id, p_parked.seq, p_parked.txn_id) on conflict do nothing;
  end if;
  delete from sync.parked p where p.log_id = p_parked.log_id and p.seq = p_parked.seq;
  -- Nobody is to decide about what doesn't exist any more.
  update sync.conflicts c set resolved_at = clock_timestamp(),
      resolution = case when p_replaced_by is null then 'discarded' else 'edited' end
    where c.txn_id = p_parked.txn_id and c.user_id = p_parked.user_id and c.outcome = 'manual'
      and c.resolved_at is null;
end $$;

-- The open parked copy under a txn_id; an error says why there is none to work on.
create or replace function sync.open_parked(p_txn_id uuid) returns sync.parked
language plpgsql set search_path = '' as $$
declare
  v_parked sync.parked;
begin
  select p.* into v_parked from sync.parked p
    where p.txn_id = p_txn_id and p.state <> 'superseded' for update;
  if found then
    return v_parked;
  elsif exists (select from sync.ledger l where l.txn_id = p_txn_id and l.verdict = 'applied') then
    raise exception 'already_applied' using errcode = 'SYP02';
  elsif exists (select from sync.ledger l where l.txn_id = p_txn_id) then
    raise exception 'already_discarded' using errcode = 'SYP02';
  elsif exists (select from sync.parked p where p.txn_id = p_txn_id) then
    raise exception 'superseded' using errcode = 'SYP02';
  end if;
  raise exception 'not_parked' using errcode = 'SYP02';
end $$;

-- What waited for a discarded transaction waits for what that one waited for, and chained ops build
-- on the base that it had; on none when a retry put it on other ground meanwhile (`met`, 013).
create or replace function sync.unlink(p_parked sync.parked) returns void
language plpgsql set search_path = '' as $$
declare
  v_bases constant jsonb := coalesce((
    select jsonb_object_agg((o ->> 'table') || '/' || (o ->> 'id'), o -> 'base')
      from jsonb_array_elements(p_parked.item -> 'ops') o), '{}');
begin
  update sync.parked w set changed_at = clock_timestamp(), item = w.item || jsonb_build_object(
      'after', (select coalesce(jsonb_agg(distinct a), '[]') from (
        select a from jsonb_array_elements(w.item -> 'after') a
          where a <> to_jsonb(p_parked.txn_id::text)
        union select a from jsonb_array_elements(p_parked.item -> 'after') a) x),
      'ops', (select coalesce(jsonb_agg(case
          when o ->> 'base' = 'chained' and v_bases ? ((o ->> 'table') || '/' || (o ->> 'id'))
            then o || jsonb_build_object('base', case
              when p_parked.item -> 'met' -> ((o ->> 'table') || '/' || (o ->> 'id'))
                is not distinct from w.item -> 'met' -> ((o ->> 'table') || '/' || (o ->> 'id'))
              then v_bases -> ((o ->> 'table') || '/' || (o ->> 'id')) end)
          else o end order by n), '[]')
        from jsonb_array_elements(w.item -> 'ops') with ordinality x (o, n)))
    where w.state <> 'superseded' and w.item -> 'after' ? p_parked.txn_id::text;
end $$;

create or replace function public.sync_discard_v1(p jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set timezone = 'UTC' set statement_timeout = '20s' set lock_timeout = '3s' as $$
declare
  v_txn_ids constant uuid[] := array(select x::uuid from jsonb_array_elements_text(p -> 'txn_ids') x);
  v_txn_id uuid;
  v_parked sync.parked;
  v_waiting record;
  v_results jsonb := '[]';
  v_claims constant text := current_setting('request.jwt.claims', true);
begin
  perform sync.guard();
  perform sync.lock_parked(v_txn_ids);
  foreach v_txn_id in array v_txn_ids loop
    v_parked := sync.open_parked(v_txn_id);
    perform sync.unlink(v_parked);
    perform sync.discard(v_parked, null);
    v_results := v_results || jsonb_build_array(sync.complete(
      v_parked.item, '{"verdict": "parked", "state": "discarded"}'));
    for v_waiting in select w.log_id, w.seq from sync.parked w
        where w.state = 'held' and w.blocked_by = v_txn_id order by w.log_id, w.seq loop
      v_results := sync.retry_one(v_waiting.log_id, v_waiting.seq, v_results);
    end loop;
  end loop;
  perform sync.leave(v_claims);
  return jsonb_build_object('results', v_results);
end $$;

-- Discard a parked transaction in favour of one with other ops, which is parked in its place;
-- what waited for the old one waits for the new one.
create or replace function sync.replace_parked(
  p_parked sync.parked, p_txn_id uuid, p_digest text, p_item jsonb
) returns sync.parked language plpgsql set search_path = '' as $$
declare
  v_seq constant bigint := sync.next_people_seq();
  v_new sync.parked;
begin
  perform sync.discard(p_parked, p_txn_id);
  perform sync.park(sync.people(), p_item || jsonb_build_object('txn_id', p_txn_id,
      'seq', v_seq, 'digest', p_digest, 'replaces', p_parked.txn_id, 'stands_for',
      (select jsonb_build_array(x.log_id, x.seq) from sync.place_of(p_parked) x)),
    jsonb_build_object('state', 'dead', 'sqlstate', p_parked.sqlstate, 'op', p_parked.op,
      'message', 'edited; not tried yet'));
  update sync.parked w set changed_at = clock_timestamp(),
      blocked_by = case when w.blocked_by = p_parked.txn_id then p_txn_id else w.blocked_by end,
      item = w.item || jsonb_build_object('after', (
        select jsonb_agg(case when a = p_parked.txn_id::text then p_txn_id::text else a end)
        from jsonb_array_elements_text(w.item -> 'after') a))
    where w.state <> 'superseded' and w.item -> 'after' ? p_parked.txn_id::text;
  select q.* into strict v_new from sync.parked q where q.log_id = sync.people() and q.seq = v_seq;
  return v_new;
end $$;

create or replace function public.sync_edit_v1(p jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set timezone = 'UTC' set statement_timeout = '20s' set lock_timeout = '3s' as $$
declare
  v_parked sync.parked;
  v_new sync.parked;
begin
  perform sync.guard();
  perform sync.lock_parked(array[(p ->> 'txn_id')::uuid]);
  v_parked := sync.open_parked((p ->> 'txn_id')::uuid);
  if jsonb_array_length(p -> 'ops') <> jsonb_array_length(v_parked.item -> 'ops') then
    perform sync.protocol_error('an edit changes values; it can''t add or remove ops');
  end if;
  v_new := sync.replace_parked(v_parked, (p ->> 'new_txn_id')::uuid, p ->> 'digest',
    v_parked.item || jsonb_build_object('ops', p -> 'ops'));
  return jsonb_build_object('results', jsonb_build_array(sync.complete(
    v_new.item, '{"verdict": "parked", "state": "dead"}')));
end $$;

-- What a person's `theirs` leaves of an op: nothing but the columns that weren't in conflict. It stays
-- an op on the row, so that the transaction's versions tell what it is at.
-- Of a column that was merged by key, only the disputed keys become theirs.
create or replace function sync.without_columns(
  p_op jsonb, p_columns text[], p_theirs jsonb, p_version jsonb
) returns jsonb language plpgsql immutable set search_path = '' as $$
declare
  v_values jsonb := case when p_op ->> 'kind' = 'update' then p_op -> 'values' else '{}' end;
  v_name text;
  v_column text;
  v_key text;
begin
  foreach v_name in array p_columns loop
    v_column := split_part(v_name, '.', 1);
    v_key := substr(v_name, length(v_column) + 2);
    if v_key = '' or jsonb_typeof(v_values -> v_column) is distinct from 'object' then
      v_values := v_values - v_column;
    else
      v_values := jsonb_set(v_values, array[v_column], case when p_theirs ? v_name
        then (v_values -> v_column) || jsonb_build_object(v_key, p_theirs -> v_name)
        else (v_values -> v_column) - v_key end);
    end if;
  end loop;
  return p_op || jsonb_build_object('kind', 'update', 'base', p_version, 'values', v_values);
end $$;

-- Decide one record of a parked transaction; returns the item as it goes on. An op that is left out
-- takes its `before` along: they stand beside each other. Where it is mine, the transaction stands on
-- their version from now on (`met`, 013): what waits behind it on another ground must meet the row by
-- itself, because the person decided about this change and not about those.
create or replace function sync.decide(
  p_item jsonb, p_record sync.conflicts, p_choice text
) returns jsonb language plpgsql set search_path = '' as $$
declare
  v_ops jsonb := '[]';
  v_before jsonb := '[]';
  v_met jsonb := '{}';
  v_op jsonb;
  v_n int;
begin
  for v_op, v_n in
    select o, n from jsonb_array_elements(p_item -> 'ops') with ordinality x (o, n)
  loop
    if v_op ->> 'table' = p_record.table_name and v_op ->> 'id' = p_record.row_id then
      if p_choice = 'mine' then
        v_met := jsonb_build_object(p_record.table_name || '/' || p_record.row_id,
          p_record.theirs_version);
      end if;
      if p_choice = 'mine' and v_op ->> 'kind' <> 'insert' then
        v_op := v_op || jsonb_build_object('base', p_record.theirs_version);
      elsif p_choice = 'mine' then  -- there is a row: mine goes over it
        v_op := v_op || jsonb_build_object('kind', 'update', 'base', p_record.theirs_version);
      elsif p_record.theirs_version is not null then
        v_op := sync.without_columns(
          v_op, p_record.columns, p_record.theirs, to_jsonb(p_record.theirs_version));
      else
        continue;  -- their row is gone, and so is this op
      end if;
    end if;
    v_ops := v_ops || jsonb_build_array(v_op);
    v_before := v_before || jsonb_build_array(p_item -> 'before' -> (v_n - 1));
  end loop;
  return p_item || jsonb_build_object(
    'ops', v_ops, 'before', v_before, 'met', coalesce(p_item -> 'met', '{}') || v_met);
end $$;

-- After `theirs` or an edited row: waiting transactions that the record covers lose the columns too,
-- and give up deleting the row. One that the person hasn't seen must not overwrite the decision
-- unnoticed, so it is made to meet the row.
create or replace function sync.follow_decision(
  p_parked sync.parked, p_record sync.conflicts
) returns void language plpgsql set search_path = '' as $$
declare
  v_through constant bigint := sync.covered_through(p_parked, p_record.through);
  v_waiting record;
  v_changes boolean;
  v_op jsonb;
  v_ops jsonb;
begin
  for v_waiting in select w.log_id, w.seq, w.item, b.seq as place
      from sync.parked_behind(p_parked) b
      join sync.parked w on w.log_id = (b.waiting).log_id and w.seq = (b.waiting).seq
      where w.keys @> array[p_record.table_name || '/' || p_record.row_id]
      order by b.seq for update of w loop
    v_ops := '[]';
    for v_op in select o from jsonb_array_elements(v_waiting.item -> 'ops') o loop
      if v_op ->> 'table' = p_record.table_name and v_op ->> 'id' = p_record.row_id then
        v_changes := v_op ->> 'kind' = 'update' and v_op -> 'values'
          ?| array(select split_part(c, '.', 1) from unnest(p_record.columns) c);
        if v_waiting.place <= v_through and (v_changes or v_op ->> 'kind' = 'delete') then
          v_op := sync.without_columns(
            v_op, p_record.columns, p_record.theirs, v_op -> 'base');
        elsif v_changes then
          v_op := v_op || '{"base": null}';
        end if;
      end if;
      v_ops := v_ops || jsonb_build_array(v_op);
    end loop;
    update sync.parked w set item = w.item || jsonb_build_object('ops', v_ops)
      where w.log_id = v_waiting.log_id and w.seq = v_waiting.seq;
  end loop;
end $$;

-- {"id": a conflict record's id, "choice": mine | theirs | edited, "row": {column: value},
--  "new_txn_id", "digest"}: the last three for an edited row. The choice goes for every undecided
-- record of the same transaction; an edited row for the named record, its others take mine.
create or replace function public.sync_resolve_v1(p jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set timezone = 'UTC' set statement_timeout = '20s' set lock_timeout = '3s' as $$
declare
  v_choice constant text := p ->> 'choice';
  v_named sync.conflicts;
  v_record sync.conflicts;
  v_parked sync.parked;
  v_item jsonb;
  v_decided uuid[] := '{}';
  v_results jsonb := '[]';
  v_claims constant text := current_setting('request.jwt.claims', true);
begin
  perform sync.guard();
  select c.* into v_named from sync.conflicts c where c.id = (p ->> 'id')::uuid;
  if not found then
    raise exception 'no_such_conflict' using errcode = 'SYP02';
  elsif v_named.outcome <> 'manual' or v_named.resolved_at is not null then
    raise exception 'already_resolved' using errcode = 'SYP02';
  elsif v_choice is null or v_choice not in ('mine', 'theirs', 'edited') then
    perform sync.protocol_error('choice must be mine, theirs or edited');
  elsif v_choice <> 'theirs' and v_named.theirs_version is null then
    raise exception 'row_is_gone' using errcode = 'SYP02';  -- an update can't bring a row back
  end if;
  perform sync.lock_parked(array[v_named.txn_id]);
  v_parked := sync.open_parked(v_named.txn_id);
  v_item := v_parked.item;
  for v_record in select c.* from sync.conflicts c where c.txn_id = v_named.txn_id
      and c.user_id = v_named.user_id and c.outcome = 'manual' and c.resolved_at is null loop
    v_item := sync.decide(v_item, v_record, case when v_choice = 'theirs' then 'theirs'
      when v_record.theirs_version is null then 'theirs' else 'mine' end);
    if v_choice <> 'mine' then
      perform sync.follow_decision(v_parked, v_record);
      v_item := v_item || jsonb_build_object('decided', coalesce(v_item -> 'decided', '[]')
        || to_jsonb(v_record.table_name || '/' || v_record.row_id));
    end if;
    v_decided := v_decided || v_record.id;
  end loop;
  if v_choice = 'edited' then
    v_item := v_item || jsonb_build_object('ops', (select jsonb_agg(case
        when o ->> 'table' = v_named.table_name and o ->> 'id' = v_named.row_id
          then o || jsonb_build_object('kind', 'update', 'values', p -> 'row') else o end order by n)
      from jsonb_array_elements(v_item -> 'ops') with ordinality x (o, n)));
    v_parked := sync.replace_parked(
      v_parked, (p ->> 'new_txn_id')::uuid, p ->> 'digest', v_item);
  else
    -- A row that it doesn't write any more has no say in what becomes of the rest.
    update sync.parked q set item = v_item, keys = sync.keys_for(v_item -> 'ops')
      where q.log_id = v_parked.log_id and q.seq = v_parked.seq;
  end if;
  v_results := sync.retry_one(v_parked.log_id, v_parked.seq, v_results);
  -- A row that moved again has a newer record in the old one's place by now, and is still undecided.
  update sync.conflicts c set resolution = v_choice, resolved_at = clock_timestamp()
    where c.id = any (v_decided);
  perform sync.leave(v_claims);
  return jsonb_build_object('results', v_results);
end $$;

-- {"txn_ids", "log_id", "user_id", "state", "after": [parked_at, txn_id], "limit", "full"}: each
-- narrows; `full` brings the items with users' data.
create or replace function public.sync_list_parked_v1(p jsonb) returns jsonb
language plpgsql stable security invoker
set search_path = '' set timezone = 'UTC' set statement_timeout = '20s' as $$
declare
  v_parked jsonb;
begin
  perform sync.guard();
  select coalesce(jsonb_agg(to_jsonb(x) order by x.log_id, x.seq), '[]') into v_parked from (
    select q.txn_id, q.log_id, q.seq, q.user_id, q.state, q.sqlstate, q.op,
      -- Data errors quote the value, a trigger may say anything; constraints only give their names.
      case when (p ->> 'full')::boolean or q.sqlstate is null
          or q.sqlstate ~ '^(23|42501|02000|SYT)' then q.message end as message,
      q.blocked_by, q.replaces, q.attempts, q.keys, q.parked_at, q.changed_at,
      case when (p ->> 'full')::boolean then q.item end as item,
      (select count(*) from sync.parked w where w.item -> 'after' ? q.txn_id::text) as waiting
    from sync.parked q
    where (not p ? 'txn_ids' or p -> 'txn_ids' ? q.txn_id::text)
      and (p ->> 'log_id' is null or q.log_id = (p ->> 'log_id')::uuid)
      and (p ->> 'user_id' is null or q.user_id = (p ->> 'user_id')::uuid)
      and case when p ->> 'state' is null then q.state <> 'superseded' or p ? 'txn_ids'
        else q.state = p ->> 'state' end
      and (p ->> 'after_log_id' is null or (q.log_id, q.seq)
        > ((p ->> 'after_log_id')::uuid, (p ->> 'after_seq')::bigint))
    order by q.log_id, q.seq
    limit least(coalesce((p ->> 'limit')::int, 500), 2000)) x;
  return jsonb_build_object('parked', v_parked);
end $$;

-- {"id", "txn_ids", "user_id", "open": only undecided ones, "limit", "full"}.
create or replace function public.sync_list_conflicts_v1(p jsonb) returns jsonb
language plpgsql stable security invoker
set search_path = '' set timezone = 'UTC' set statement_timeout = '20s' as $$
declare
  v_conflicts jsonb;
begin
  perform sync.guard();
  select coalesce(jsonb_agg(to_jsonb(x) order by x.recorded_at, x.id), '[]') into v_conflicts from (
    select c.id, c.txn_id, c.log_id, c.seq, c.user_id, c.table_name as "table", c.row_id,
      c.columns, c.base, c.mine, c.theirs, c.theirs_version, c.policy, c.outcome, c.note,
      c.recorded_at, c.resolution, c.resolved_at
    from sync.conflicts c
    where (p ->> 'id' is null or c.id = (p ->> 'id')::uuid)
      and (not p ? 'txn_ids' or p -> 'txn_ids' ? c.txn_id::text)
      and (p ->> 'user_id' is null or c.user_id = (p ->> 'user_id')::uuid)
      and (not coalesce((p ->> 'open')::boolean, false)
        or (c.outcome = 'manual' and c.resolved_at is null))
      and (p ->> 'after_id' is null or (c.recorded_at, c.id)
        > ((p ->> 'after_at')::timestamptz, (p ->> 'after_id')::uuid))
    order by c.recorded_at, c.id
    limit least(coalesce((p ->> 'limit')::int, 500), 2000)) x;
  return jsonb_build_object('conflicts', v_conflicts);
end $$;

do $$
declare
  v_function text;
begin
  foreach v_function in array array['sync_park_v1', 'sync_retry_v1', 'sync_discard_v1',
    'sync_edit_v1', 'sync_resolve_v1', 'sync_list_parked_v1', 'sync_list_conflicts_v1']
  loop
    execute format('revoke all on function public.%I(jsonb) from public, anon, authenticated',
      v_function);
    execute format('grant execute on function public.%I(jsonb) to service_role', v_function);
  end loop;
end $$;

notify pgrst, 'reload schema';
