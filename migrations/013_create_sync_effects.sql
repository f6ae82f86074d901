-- 013 From an op to its effect: what the batch RPC (009) and the parking RPCs (011) share.
--
-- keys_of, lock_rows     which rows a batch will touch, locked in one order before any effect
-- prepare_op, prepare    an op as SQL statements with its base, made while still service_role
-- enter, leave, see      acting and reading as the author
--
-- Functions here are called by name at run time, so this file may come after those that use it.

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
    'parent', v_table.parent_name || '/' || (v_values ->> v_table.parent_column),
    -- The version, and of an inserted row what its author left to the table's defaults: without
    -- it nobody could tell later whether somebody else changed one of these columns.
    'left_sql', format('select to_json(t.%I) #>> ''{}'', %s from %s t where t.%I = $1::%s',
      v_table.version_column,
      case when p_op ->> 'kind' = 'insert' then format('to_jsonb(t) - %L::text[]',
        v_columns || v_table.server_owned || array[
          v_table.key_column, v_table.owner_column, v_table.version_column])
        else 'null::jsonb' end,
      v_target, v_table.key_column, v_table.key_type),
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

-- The base that an unfinished predecessor was made on, followed back through what is parked to what
-- was applied; {"never": true} when it inserted the row, or a person left its change of the row out;
-- null when there is no such predecessor.
-- Only deletes ask: they pass what is parked on their rows. A version that the ledger has forgotten
-- is one that no row has: the delete is a conflict then, and keeps nobody else waiting.
create or replace function sync.parked_base(p_after jsonb, p_user uuid, p_key text) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  v_found record;
begin
  select o ->> 'kind' as kind, o ->> 'base' as base, p.item -> 'after' as after into v_found
    from sync.parked p cross join jsonb_array_elements(p.item -> 'ops') with ordinality x (o, n)
    where p.txn_id in (select a::uuid from jsonb_array_elements_text(p_after) a)
      and p.user_id = p_user
      and (o ->> 'table') || '/' || (o ->> 'id') = p_key
    order by p.parked_at desc, x.n limit 1;
  if not found then
    return coalesce(
      (select jsonb_build_object('base', l.versions ->> p_key) from sync.ledger l
        where l.txn_id in (select a::uuid from jsonb_array_elements_text(p_after) a)
          and l.user_id = p_user and l.versions ? p_key
        order by l.seq desc limit 1),
      (select '{"never": true}'::jsonb from sync.parked p
        where p.txn_id in (select a::uuid from jsonb_array_elements_text(p_after) a)
          and p.user_id = p_user limit 1));
  elsif v_found.kind = 'insert' then
    return '{"never": true}';
  elsif v_found.base = 'chained' then
    return coalesce(sync.parked_base(v_found.after, p_user, p_key), '{"base": "-infinity"}');
  end if;
  return jsonb_build_object('base', v_found.base);
end $$;

-- Fill in each op's statements and its base; `chained` is the version that this log's earlier
-- transaction produced: in this batch, or, after a lost reply, as the ledger stored it. A base of
-- null says that the sender has never seen the row on the server: any row there is a surprise.
--
-- A request may arrive long after its sender gave it up, and a segment may be taken in long after it
-- was sealed. If its first change was merged and applied meanwhile, the second one must not follow
-- that: its author hasn't seen what the first was merged with. So a predecessor that was applied
-- with another `met`, or without the row at all, is no base: any row there is a surprise.
--
-- `p_chain` is what this batch made of each row so far: {versions: {key: version}, met: {key:
-- version}}, `met` as the ledger keeps it.
create or replace function sync.prepare(
  p_transaction jsonb, p_chain jsonb
) returns jsonb language plpgsql set search_path = '' as $$
declare
  v_user constant uuid := (p_transaction ->> 'user_id')::uuid;
  v_op jsonb;
  v_key text;
  v_base text;
  v_parked jsonb;
  v_found boolean;      -- a predecessor is in the ledger
  v_rewritten boolean;  -- and was applied on other ground
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
    v_parked := null;
    v_found := null;
    v_rewritten := null;
    if v_base = 'chained' and not v_key = any (v_seen) then
      v_base := case when p_chain -> 'met' ->> v_key
        is not distinct from p_transaction -> 'met' ->> v_key
        then p_chain -> 'versions' ->> v_key end;
      if v_base is null then
        select l.versions ->> v_key, true,
            l.met ->> v_key is distinct from p_transaction -> 'met' ->> v_key
          into v_base, v_found, v_rewritten from sync.ledger l
          where l.txn_id in (
            select a::uuid from jsonb_array_elements_text(p_transaction -> 'after') a)
            and l.user_id = v_user
          order by not l.versions ? v_key, l.versions ->> v_key is null, l.seq desc,
            l.applied_at desc limit 1;  -- two logs may have the same seq
      end if;
      if v_rewritten and v_base is not null then
        v_base := null;
      elsif v_base is null and v_op ->> 'kind' = 'delete' then
        v_parked := sync.parked_base(p_transaction -> 'after', v_user, v_key);
        v_base := v_parked ->> 'base';
      end if;
      -- What came to nothing is not built upon either: any row there is a surprise.
      if v_base is null and v_parked is null and v_found is null
          and not coalesce(p_chain -> 'versions' ? v_key, false)
          and not exists (select from jsonb_array_elements_text(p_transaction -> 'after') a
            where sync.came_to_nothing(a::uuid, v_user)) then
        perform sync.protocol_error('chained without a predecessor: ' || v_key);
      end if;
    elsif not v_op ? 'base' and v_op ->> 'kind' <> 'insert' then
      perform sync.protocol_error('an ' || (v_op ->> 'kind') || ' without a base: ' || v_key);
    end if;
    v_prepared := v_prepared || jsonb_build_array(
      v_op || sync.prepare_op(v_op, v_user)
        || jsonb_build_object('base', v_base, 'follows', v_key = any (v_seen),
          'never', coalesce(v_parked ? 'never', false)));
    v_seen := v_seen || v_key;
  end loop;
  return v_prepared;
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

revoke all on all functions in schema sync from public, anon, authenticated;
grant execute on all functions in schema sync to service_role;
revoke all on function sync.remember_deleted() from service_role;

notify pgrst, 'reload schema';
