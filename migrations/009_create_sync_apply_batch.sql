-- 009 The batch RPC: the server's half of "exactly once, in order, as the author".
--
-- A batch is one Postgres transaction. In it each delivered transaction is all or nothing, and gets
-- one verdict, in the order sent:
--
--   guard → lock the log → remember its end → lock rows in one order → for each transaction:
--     in the ledger?            duplicate, with the versions stored then and the rows as they are
--     a predecessor missing?    held, blocked_by
--     a row not at its base?    conflict, with the rows as the author sees them
--     take effect as the author under row-level security
--       refused by the data     rejected, with SQLSTATE and op      (a person must look)
--       refused for now         held, with SQLSTATE                 (a parent or a column is missing)
--     write the ledger row      applied, with the new versions
--
-- Final verdicts are in the ledger; conflict, held and rejected leave no trace, so they can be sent
-- again. Conflicts are data in the reply, never errors: PostgREST retries serialisation errors by
-- itself. Errors outside the allow-list are raised and fail the call, because a full disk or a bug
-- must not turn a batch into dead letters.
--
-- The caller is service_role; effects run as `authenticated` with the author's claims. Whoever may
-- execute these functions can act as anybody, so nobody else may, and each checks again.

drop function if exists sync.prepare_op(jsonb);  -- took no author before

-- First line of every function that the API exposes here.
create or replace function sync.guard() returns void
language plpgsql set search_path = '' as $$
begin
  if current_user <> 'service_role' then
    raise exception 'only service_role may call the sync functions' using errcode = '42501';
  end if;
end $$;

-- A protocol error is the sender's bug: it fails the call and nothing of the batch happens.
create or replace function sync.protocol_error(p_message text) returns void
language plpgsql set search_path = '' as $$
begin
  raise exception 'sync protocol: %', p_message using errcode = 'SYP01';
end $$;

-- Ids arrive as text. One that can't be a key of its table is left out of the lock and fails in its
-- own transaction later, instead of failing everybody's here.
create or replace function sync.keys_of(p_ids text[], p_key_type text) returns text[]
language sql immutable set search_path = '' as $$
  select coalesce(array_agg(distinct i), '{}') from unnest(p_ids) i
  where p_key_type <> 'uuid'
    or i ~* '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$'
$$;

-- Lock every row that the batch writes, and the parents that counters will touch: tables in their
-- registered order, rows by key. Without it two batches lock shared parents crosswise and deadlock.
-- A child that is already there is counted at its parent too, so its parent is looked up as well.
--
-- A row that somebody holds must not stop everybody else's transactions: when the wait is over
-- (lock_timeout of the RPC), the rest of the call goes on without this table's locks and waits a
-- blink per transaction, which makes the ones on that row `held`. Waits that short can't deadlock:
-- Postgres looks for a deadlock after a second.
create or replace function sync.lock_rows(p_transactions jsonb) returns void
language plpgsql set search_path = '' as $$
declare
  v_table sync.tables;
  v_child sync.tables;
  v_names text[];
  v_ids text[];
  v_kinds text[];
  v_values_parents text[];
  v_wanted text[];
  v_parents text[];
begin
  select array_agg(o ->> 'table'), array_agg(o ->> 'id'), array_agg(o ->> 'kind'),
      array_agg(o -> 'values' ->> c.parent_column)
    into v_names, v_ids, v_kinds, v_values_parents
    from jsonb_array_elements(p_transactions) t
    cross join jsonb_array_elements(t -> 'ops') o
    left join sync.tables c on c.name = o ->> 'table';
  for v_table in select t.* from sync.tables t order by t.position loop
    select array_agg(x.id) into v_wanted
      from unnest(v_names, v_ids) x (name, id) where x.name = v_table.name;
    begin
      for v_child in select c.* from sync.tables c where c.parent_name = v_table.name loop
        execute format(
          'select array_agg(distinct t.%I::text) from %I.%I t where t.%I = any ($1::%s[])',
          v_child.parent_column, v_child.schema_name, v_child.name, v_child.key_column,
          v_child.key_type)
          into v_parents
          using sync.keys_of(
            (select array_agg(x.id) from unnest(v_names, v_ids, v_kinds) x (name, id, kind)
              where x.name = v_child.name and x.kind <> 'insert'), v_child.key_type);
        v_wanted := v_wanted || v_parents
          || (select array_agg(x.parent) from unnest(v_names, v_values_parents) x (name, parent)
                where x.name = v_child.name);
      end loop;
      continue when v_wanted is null;
      execute format(
        'select 1 from %I.%I t where t.%I = any ($1::%s[]) order by t.%I for %s',
        v_table.schema_name, v_table.name, v_table.key_column, v_table.key_type,
        v_table.key_column,
        -- A delete needs the stronger lock; getting it later could deadlock with a foreign key's.
        case when exists (select from unnest(v_names, v_kinds) x (name, kind)
              where x.name = v_table.name and x.kind = 'delete')
          then 'update' else 'no key update' end)
        using sync.keys_of(v_wanted, v_table.key_type);
    exception
      when undefined_table or undefined_column then
        null;  -- changed under a running system: its transactions are held one by one below
      when lock_not_available then
        perform set_config('lock_timeout', '20ms', true);  -- ends with the RPC, which sets its own
    end;
  end loop;
end $$;

-- What is needed to carry out one op, prepared while still service_role: the author may read
-- neither sync.tables nor call functions in this schema.
-- What can't be done at all becomes `problem` and is raised in its turn, so that the reply can name
-- the op, and a conflict on another row of the transaction still outranks it.
create or replace function sync.prepare_op(p_op jsonb, p_user uuid) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  v_values constant jsonb := coalesce(nullif(p_op -> 'values', 'null'), '{}');
  v_key constant text := (p_op ->> 'table') || '/' || (p_op ->> 'id');
  v_table sync.tables;
  v_columns text[];
  v_forbidden text;
  v_set text;
  v_target text;
begin
  select t.* into v_table from sync.tables t where t.name = p_op ->> 'table';
  if not found then
    return jsonb_build_object('key', v_key, 'problem', '42P01',
      'says', format('table %s is not registered', p_op ->> 'table'));
  end if;
  if jsonb_typeof(v_values) <> 'object' then
    return jsonb_build_object('key', v_key, 'problem', '22023', 'says', 'values must be an object');
  end if;
  if sync.keys_of(array[p_op ->> 'id'], v_table.key_type) = '{}' then
    return jsonb_build_object('key', v_key, 'problem', '22P02',
      'says', 'the id is no key of the table');
  end if;
  -- Key and owner may be repeated in values, as long as they say the same.
  select coalesce(array_agg(k order by k), '{}') into v_columns from jsonb_object_keys(v_values) k
    where not (k = v_table.key_column and v_values ->> k = p_op ->> 'id')
      and not (k = v_table.owner_column and v_values ->> k = p_user::text);
  select c into v_forbidden from unnest(v_columns) c
    where c = any (v_table.server_owned || array[
      v_table.key_column, v_table.owner_column, v_table.version_column])
    limit 1;
  if v_forbidden is not null then
    return jsonb_build_object('key', v_key, 'problem', '22023',
      'says', format('column %s is owned by the server', v_forbidden));
  end if;
  v_target := format('%I.%I', v_table.schema_name, v_table.name);
  return jsonb_build_object(
    'key', v_key,
    'values', v_values,
    'version_sql', format('select to_json(t.%I) #>> ''{}'' from %s t where t.%I = $1::%s',
      v_table.version_column, v_target, v_table.key_column, v_table.key_type),
    -- Locks what lock_rows couldn't: nobody may come between this look and the effect.
    'stale_sql', format('select t.%I is distinct from $2::%s from %s t where t.%I = $1::%s'
      ' for no key update',
      v_table.version_column, v_table.version_type, v_target, v_table.key_column,
      v_table.key_type),
    'row_sql', format('select to_jsonb(t) from %s t where t.%I = $1::%s',
      v_target, v_table.key_column, v_table.key_type),
    'effect_sql', case p_op ->> 'kind'
      -- Only the columns that were sent: an absent one gets its default, not NULL.
      when 'insert' then format(
        'insert into %s (%I, %I%s) select $1::%s, $3%s from jsonb_populate_record(null::%s, $2) r',
        v_target, v_table.key_column, v_table.owner_column,
        (select coalesce(string_agg(', ' || quote_ident(c), ''), '') from unnest(v_columns) c),
        v_table.key_type,
        (select coalesce(string_agg(', r.' || quote_ident(c), ''), '') from unnest(v_columns) c),
        v_target)
      when 'update' then case when v_columns = '{}' then format(
        'select 1 from %s t where t.%I = $1::%s', v_target, v_table.key_column, v_table.key_type)
      else format(
        'update %s t set %s from jsonb_populate_record(null::%s, $2) r where t.%I = $1::%s',
        v_target,
        (select string_agg(format('%1$I = r.%1$I', c), ', ') from unnest(v_columns) c),
        v_target, v_table.key_column, v_table.key_type) end
      when 'delete' then format('delete from %s t where t.%I = $1::%s',
        v_target, v_table.key_column, v_table.key_type)
    end);
end $$;

-- Become the author for what follows in this database transaction. Both forms of the claims are set,
-- because auth.uid() prefers the older one. The way back is set_config('role', 'service_role'), not
-- RESET ROLE, which lands on the connection's login role.
create or replace function sync.enter(p_user uuid, p_accepted_at text) returns void
language plpgsql set search_path = '' as $$
begin
  perform set_config('sync.accepted_at', coalesce(p_accepted_at, ''), true),
    set_config('request.jwt.claim.sub', p_user::text, true),
    set_config('request.jwt.claims',
      json_build_object('sub', p_user, 'role', 'authenticated')::text, true);
  perform set_config('role', 'authenticated', true);
end $$;

-- Nobody's claims and no moment of acceptance outlast a call. The argument: the claims before it.
create or replace function sync.leave(p_claims text) returns void
language plpgsql set search_path = '' as $$
begin
  perform set_config('sync.accepted_at', '', true), set_config('request.jwt.claim.sub', '', true),
    set_config('request.jwt.claims', coalesce(p_claims, ''), true);
end $$;

-- Rows as a user sees them: {key: row or null}. Each read is {key, id, row_sql}.
create or replace function sync.see(p_user uuid, p_reads jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
  v_read jsonb;
  v_row jsonb;
  v_rows jsonb := '{}';
begin
  perform sync.enter(p_user, null);
  for v_read in select r from jsonb_array_elements(p_reads) r loop
    v_row := null;
    execute v_read ->> 'row_sql' into v_row using v_read ->> 'id';
    v_rows := v_rows || jsonb_build_object(v_read ->> 'key', v_row);
  end loop;
  perform set_config('role', 'service_role', true);
  return v_rows;
end $$;

-- Which rows of a transaction aren't where its author believed: [{key, id, row_sql, op}], empty when
-- all are. Runs as service_role, so that a hidden row is told from an absent one by the caller.
create or replace function sync.find_stale(p_ops jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
  v_op jsonb;
  v_stale boolean;
  v_found jsonb := '[]';
begin
  for v_op in select o from jsonb_array_elements(p_ops) o loop
    -- An earlier op of the same transaction made it, or it can't be looked at.
    continue when v_op ->> 'follows' = 'true' or v_op ? 'problem';
    v_stale := null;
    execute v_op ->> 'stale_sql' into v_stale using v_op ->> 'id', v_op ->> 'base';
    if v_op ->> 'kind' = 'insert' then
      v_stale := v_stale is not null;           -- any row under this id
    else
      v_stale := coalesce(v_stale, true);       -- no row, or another version
    end if;
    if v_stale then
      v_found := v_found || jsonb_build_array(v_op);
    end if;
  end loop;
  return v_found;
end $$;

-- Fill in each op's statements and its base; `chained` is the version that this log's earlier
-- transaction produced: in this batch, or, after a lost reply, as the ledger stored it.
create or replace function sync.prepare(
  p_transaction jsonb, p_chain jsonb
) returns jsonb language plpgsql set search_path = '' as $$
declare
  v_op jsonb;
  v_key text;
  v_base text;
  v_seen text[] := '{}';
  v_prepared jsonb := '[]';
begin
  for v_op in select o from jsonb_array_elements(p_transaction -> 'ops') o loop
    if coalesce(v_op ->> 'kind', '') not in ('insert', 'update', 'delete') then
      perform sync.protocol_error('an op has no known kind');
    end if;
    v_key := (v_op ->> 'table') || '/' || (v_op ->> 'id');
    if v_key is null then
      perform sync.protocol_error('an op without a table or an id');
    end if;
    v_base := v_op ->> 'base';
    if v_base = 'chained' and not v_key = any (v_seen) then
      v_base := p_chain ->> v_key;
      if v_base is null then
        select l.versions ->> v_key into v_base from sync.ledger l
          where l.txn_id in (
            select a::uuid from jsonb_array_elements_text(p_transaction -> 'after') a)
            and l.user_id = (p_transaction ->> 'user_id')::uuid
            and l.versions ->> v_key is not null
          order by l.seq desc limit 1;
      end if;
      if v_base is null and not p_chain ? v_key then
        perform sync.protocol_error('chained without a predecessor: ' || v_key);
      end if;
    elsif v_base is null and v_op ->> 'kind' <> 'insert' then
      perform sync.protocol_error('an ' || (v_op ->> 'kind') || ' without a base: ' || v_key);
    end if;
    v_prepared := v_prepared || jsonb_build_array(
      v_op || sync.prepare_op(v_op, (p_transaction ->> 'user_id')::uuid)
        || jsonb_build_object('base', v_base, 'follows', v_key = any (v_seen)));
    v_seen := v_seen || v_key;
  end loop;
  return v_prepared;
end $$;

-- Does the refusal belong to the data (rejected), to the moment (held), or to nobody (null)?
create or replace function sync.verdict_for(p_sqlstate text) returns text
language sql immutable set search_path = '' as $$
  select case
    when p_sqlstate like '22%' then 'rejected'
    when p_sqlstate in ('23502', '23505', '23514', '23P01', '42501', '54000', 'P0001')
      then 'rejected'
    when p_sqlstate in ('23503', '55P03', '42P01', '42703', '42883', '42804') then 'held'
  end
$$;

-- The versions a transaction leaves behind: {key: version, or null when the row is gone}. Read at
-- the end, because triggers may have moved a row again after its own statement.
create or replace function sync.versions_of(p_ops jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
  v_op jsonb;
  v_version text;
  v_versions jsonb := '{}';
begin
  for v_op in select o from jsonb_array_elements(p_ops) o loop
    v_version := null;
    execute v_op ->> 'version_sql' into v_version using v_op ->> 'id';
    v_versions := v_versions || jsonb_build_object(v_op ->> 'key', v_version);
  end loop;
  return v_versions;
end $$;

-- The answer for rows that aren't at their base: the author's view of them, or a refusal that
-- reveals nothing when they belong to somebody else.
create or replace function sync.conflict_for(p_user uuid, p_stale jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
  v_rows jsonb := sync.see(p_user, p_stale);
  v_hidden text[];
  v_item jsonb;
  v_there boolean;
begin
  for v_item in select s from jsonb_array_elements(p_stale) s loop
    if v_rows ->> (v_item ->> 'key') is null then
      v_there := false;
      execute format('select exists (%s)', v_item ->> 'row_sql') into v_there
        using v_item ->> 'id';
      if v_there then
        v_hidden := v_hidden || (v_item ->> 'key');
      end if;
    end if;
  end loop;
  if v_hidden is not null then
    v_rows := v_rows - v_hidden;
    if v_rows = '{}' then
      return jsonb_build_object('verdict', 'rejected', 'sqlstate', '42501',
        'message', 'the row is not the author''s');
    end if;
  end if;
  return jsonb_build_object('verdict', 'conflict', 'rows', v_rows,
    'message', 'the row changed since the author read it');
end $$;

-- Reads for the rows that a ledger entry names.
create or replace function sync.reads_for(p_versions jsonb) returns jsonb
language sql stable set search_path = '' as $$
  select coalesce(jsonb_agg(jsonb_build_object(
      'key', k, 'id', substr(k, strpos(k, '/') + 1),
      'row_sql', format('select to_jsonb(t) from %I.%I t where t.%I = $1::%s',
        s.schema_name, s.name, s.key_column, s.key_type))), '[]')
  from jsonb_object_keys(p_versions) k
  join sync.tables s on s.name = split_part(k, '/', 1)
$$;

-- What the ledger says of a transaction; null when it doesn't know it. Whoever sends another author's
-- txn_id hears what they would hear of a hidden row.
create or replace function sync.known(p_transaction jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
  v_user constant uuid := (p_transaction ->> 'user_id')::uuid;
  v_known sync.ledger;
begin
  select l.* into v_known from sync.ledger l where l.txn_id = (p_transaction ->> 'txn_id')::uuid;
  if not found then
    return null;
  elsif v_known.user_id <> v_user then
    return jsonb_build_object('verdict', 'rejected', 'sqlstate', '42501',
      'message', 'the row is not the author''s');
  elsif v_known.digest is distinct from p_transaction ->> 'digest' then
    return jsonb_build_object('verdict', 'rejected', 'sqlstate', 'SYT01',
      'message', 'this txn_id was applied with other content');
  end if;
  return jsonb_build_object('verdict', 'duplicate', 'versions', v_known.versions,
    'rows', sync.see(v_user, sync.reads_for(v_known.versions)));
end $$;

-- Undone by a cascade of the same transaction: a delete of a child after its parent's finds nothing
-- and is done all the same. Asked as service_role, since hidden is not gone.
create or replace function sync.gone(p_op jsonb) returns boolean
language plpgsql set search_path = '' as $$
declare
  v_there boolean;
begin
  execute format('select exists (%s)', p_op ->> 'row_sql') into v_there using p_op ->> 'id';
  return not v_there;
end $$;

-- One transaction: its verdict without the txn_id.
create or replace function sync.apply_transaction(
  p_log_id uuid, p_transaction jsonb, p_chain jsonb
) returns jsonb language plpgsql set search_path = '' as $$
declare
  v_txn_id constant uuid := (p_transaction ->> 'txn_id')::uuid;
  v_user constant uuid := (p_transaction ->> 'user_id')::uuid;
  v_known jsonb;
  v_blocker text;
  v_ops jsonb;
  v_stale jsonb := '[]';
  v_versions jsonb;
  v_state text;
  v_message text;
  v_verdict text;
  v_op jsonb;
  v_index int;
  v_count bigint;
  v_gone boolean;
begin
  v_known := sync.known(p_transaction);
  if v_known is not null then
    return v_known;
  end if;
  if exists (select from sync.ledger l
      where l.log_id = p_log_id and l.seq = (p_transaction ->> 'seq')::bigint) then
    return jsonb_build_object('verdict', 'rejected', 'sqlstate', 'SYT02',
      'message', 'this seq of the log was applied under another txn_id');
  end if;
  select a into v_blocker from jsonb_array_elements_text(p_transaction -> 'after') a
    where not exists (select from sync.ledger l
      where l.txn_id = a::uuid and l.user_id = v_user and l.verdict = 'applied') limit 1;
  if found then
    return jsonb_build_object('verdict', 'held', 'blocked_by', v_blocker);
  end if;

  begin
    v_ops := sync.prepare(p_transaction, p_chain);
    v_stale := sync.find_stale(v_ops);
    if v_stale = '[]' then
      -- From here to the way back nothing but the author's own statements may run.
      perform sync.enter(v_user, p_transaction ->> 'accepted_at');
      set constraints all deferred;
      v_index := -1;
      for v_op in select o from jsonb_array_elements(v_ops) o loop
        v_index := v_index + 1;
        if v_op ? 'problem' then
          raise exception '%', v_op ->> 'says' using errcode = v_op ->> 'problem';
        end if;
        execute v_op ->> 'effect_sql' using v_op ->> 'id', v_op -> 'values', v_user;
        get diagnostics v_count = row_count;
        if v_count = 0 and v_op ->> 'kind' = 'delete' then
          perform set_config('role', 'service_role', true);
          v_gone := sync.gone(v_op);
          perform set_config('role', 'authenticated', true);
          continue when v_gone;
        end if;
        if v_count = 0 then  -- it is there, locked and at its base: somebody else's
          raise exception 'the row is not the author''s' using errcode = '42501';
        end if;
      end loop;
      set constraints all immediate;
      perform set_config('role', 'service_role', true);
      v_versions := sync.versions_of(v_ops);
    end if;
  exception when others then
    -- The role went back with the savepoint; said again, because everything hangs on it.
    perform set_config('role', 'service_role', true);
    get stacked diagnostics v_state = returned_sqlstate, v_message = message_text;
    v_verdict := sync.verdict_for(v_state);
    if v_verdict is null then
      raise;
    end if;
    -- Conflict outranks refusal: a row may have appeared since it was looked for.
    if v_index is not null then
      v_stale := sync.find_stale(v_ops);
    end if;
    if v_stale = '[]' then
      return coalesce(sync.known(p_transaction), jsonb_build_object(
        'verdict', v_verdict, 'sqlstate', v_state, 'message', v_message, 'op', v_index));
    end if;
  end;
  -- Asked again, here and above: the same transaction may have come through another container's log
  -- (an idempotency key that was retried there) and committed while this one waited for its rows.
  if v_stale <> '[]' then
    return coalesce(sync.known(p_transaction), sync.conflict_for(v_user, v_stale));
  end if;

  insert into sync.ledger (txn_id, log_id, seq, user_id, digest, verdict, versions)
    values (v_txn_id, p_log_id, (p_transaction ->> 'seq')::bigint, v_user,
      p_transaction ->> 'digest', 'applied', v_versions);
  return jsonb_build_object('verdict', 'applied', 'versions', v_versions);
end $$;

create or replace function public.sync_apply_batch_v1(p_batch jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set timezone = 'UTC'
-- Below the client's read timeout (30 s) and the gateway's cap (60 s): the server gives up first.
-- 3 s for a lock: longer than any healthy batch holds one, and 17 s remain for the others.
set statement_timeout = '20s' set lock_timeout = '3s' as $$
declare
  v_log_id uuid;
  v_transaction jsonb;
  v_verdict jsonb;
  v_verdicts jsonb[] := '{}';
  v_chain jsonb := '{}';
  v_claims constant text := current_setting('request.jwt.claims', true);
begin
  perform sync.guard();
  if p_batch ->> 'protocol' is distinct from '1' then
    perform sync.protocol_error('this server speaks protocol 1');
  end if;
  v_log_id := (p_batch ->> 'log_id')::uuid;
  if v_log_id is null or jsonb_typeof(p_batch -> 'transactions') is distinct from 'array' then
    perform sync.protocol_error('log_id and transactions are required');
  end if;
  -- An abandoned first attempt and its retry queue here instead of meeting in the middle.
  perform pg_advisory_xact_lock(hashtextextended('sync.log/' || v_log_id, 0));
  insert into sync.logs as l (log_id, acknowledged_seq)
    values (v_log_id, coalesce((p_batch ->> 'acknowledged_seq')::bigint, 0))
    on conflict (log_id) do update set
      acknowledged_seq = greatest(l.acknowledged_seq, excluded.acknowledged_seq),
      last_seen_at = clock_timestamp();
  perform sync.lock_rows(p_batch -> 'transactions');
  for v_transaction in select t from jsonb_array_elements(p_batch -> 'transactions') t loop
    v_verdict := sync.apply_transaction(v_log_id, v_transaction, v_chain);
    if v_verdict ->> 'verdict' in ('applied', 'duplicate') then
      v_chain := v_chain || (v_verdict -> 'versions');
    end if;
    v_verdicts := v_verdicts || (
      '{"versions": {}, "rows": {}, "blocked_by": null, "op": null, "sqlstate": null,
        "message": null}'::jsonb
      || v_verdict || jsonb_build_object('txn_id', v_transaction -> 'txn_id'));
  end loop;
  perform sync.leave(v_claims);
  return jsonb_build_object('verdicts', to_jsonb(v_verdicts));
end $$;

-- The same with one unnamed text argument: PostgREST hands it over without parsing the body. Its own
-- timeout: PostgREST applies the one of the function it calls, before the statement starts.
create or replace function public.sync_apply_batch_text_v1(text) returns jsonb
language sql security invoker set search_path = '' set statement_timeout = '20s' as $$
  select public.sync_apply_batch_v1($1::jsonb)
$$;

revoke all on all functions in schema sync from public, anon, authenticated;
grant execute on all functions in schema sync to service_role;
revoke all on function public.sync_apply_batch_v1(jsonb), public.sync_apply_batch_text_v1(text)
  from public, anon, authenticated;
grant execute on function
  public.sync_apply_batch_v1(jsonb), public.sync_apply_batch_text_v1(text) to service_role;

notify pgrst, 'reload schema';
