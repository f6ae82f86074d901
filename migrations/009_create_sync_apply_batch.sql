-- 009 The batch RPC: the server's half of "exactly once, in order, as the author".
--
-- A batch is one Postgres transaction. In it each delivered transaction is all or nothing, and gets
-- one verdict, in the order sent:
--
--   guard → lock the log → remember its end → lock rows in one order → for each author's run of
--   transactions (plain ones in one stretch as the author, the others one by one):
--     in the ledger?            duplicate, with the versions stored then, the ground they stand on
--                               (`met`, 013), and the rows as they are
--     parked or discarded?      parked, with its state
--     at or below the floor?    fenced: the ledger has forgotten whether it was applied
--     a predecessor missing?    held, blocked_by
--     a row not at its base?    conflict, with the rows as the author sees them (null: deleted)
--     behind a change that a merge has put on another ground since? the same
--     a row that isn't there?   held: it may still come with another log
--     take effect as the author under row-level security
--       refused by the data     rejected, with SQLSTATE and op      (a person must look)
--       refused for now         held, with SQLSTATE                 (a parent or a column is missing)
--     write the ledger row, conflict records, what the deletes took along
--                               applied, with the new versions
--
-- Final verdicts are in the ledger; conflict, held and rejected leave no trace, so they can be sent
-- again. Conflicts are data in the reply, never errors: PostgREST retries serialisation errors by
-- itself. Errors outside the allow-list are raised and fail the call, because a full disk or a bug
-- must not turn a batch into dead letters.
--
-- The caller is service_role; effects run as `authenticated` with the author's claims. Whoever may
-- execute these functions can act as anybody, so nobody else may, and each checks again. How an op
-- becomes SQL, and how the role goes there and back: 013.

drop function if exists sync.apply_transaction(uuid, jsonb, jsonb);  -- knew no floor before
drop function if exists sync.known(jsonb);                           -- knew no log before
drop function if exists sync.find_stale(jsonb);                      -- now sync.look
drop function if exists sync.versions_of(jsonb);                     -- now sync.what_is_left

-- Which rows of a transaction aren't where its author believed: {stale: [op, …], absent: index of
-- the first op whose row isn't there, nor known to be deleted}. Runs as service_role, so that a
-- hidden row is told from an absent one by the caller.
create or replace function sync.look(p_ops jsonb, p_user uuid) returns jsonb
language plpgsql set search_path = '' as $$
declare
  v_op jsonb;
  v_index int := -1;
  v_moved boolean;
  v_stale jsonb := '[]';
  v_absent int;
begin
  for v_op in select o from jsonb_array_elements(p_ops) o loop
    v_index := v_index + 1;
    -- An earlier op of the same transaction made it, or it can't be looked at.
    continue when (v_op ->> 'follows')::boolean or v_op ? 'problem';
    v_moved := null;
    execute v_op ->> 'stale_sql' into v_moved using v_op ->> 'id', v_op ->> 'base';
    if v_op ->> 'kind' = 'insert' then
      continue when v_moved is null;
      v_moved := true;  -- any row under this id
    elsif v_moved is null then
      if sync.was_deleted(v_op ->> 'key', p_user) then
        continue when v_op ->> 'kind' = 'delete';  -- both sides wanted that
        v_moved := true;
      elsif not (v_op ->> 'kind' = 'delete' and (v_op ->> 'never')::boolean) then
        v_absent := coalesce(v_absent, v_index);
      end if;
    end if;
    if v_moved then
      v_stale := v_stale || jsonb_build_array(v_op);
    end if;
  end loop;
  return jsonb_build_object('stale', v_stale, 'absent', v_absent);
end $$;

-- Did this author have that row (`table/id`), and is it gone? Others' rows leave no trace for them.
create or replace function sync.was_deleted(p_key text, p_user uuid) returns boolean
language sql stable set search_path = '' as $$
  select exists (select from sync.tombstones t
    where t.table_name = split_part(p_key, '/', 1)
      and t.row_id = substr(p_key, strpos(p_key, '/') + 1) and t.user_id = p_user)
$$;

-- The parents that a refused transaction named and its author deleted: {key: null, …}.
create or replace function sync.deleted_parents(p_ops jsonb, p_user uuid) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  v_key text;
  v_table sync.tables;
  v_there boolean;
  v_gone jsonb := '{}';
begin
  for v_key in select distinct o ->> 'parent' from jsonb_array_elements(p_ops) o
      where sync.was_deleted(o ->> 'parent', p_user) loop
    select t.* into v_table from sync.tables t where t.name = split_part(v_key, '/', 1);
    execute format('select exists (select from %I.%I t where t.%I::text = $1)',
      v_table.schema_name, v_table.name, v_table.key_column)
      into v_there using substr(v_key, strpos(v_key, '/') + 1);
    if not v_there then  -- it may have come back by hand, which clears no tombstone
      v_gone := v_gone || jsonb_build_object(v_key, null);
    end if;
  end loop;
  return v_gone;
end $$;

-- Does the refusal belong to the data (rejected), to the moment (held), or to nobody (null)?
create or replace function sync.verdict_for(p_sqlstate text) returns text
language sql immutable set search_path = '' as $$
  select case
    when p_sqlstate like '22%' then 'rejected'
    when p_sqlstate in ('23502', '23505', '23514', '23P01', '42501', '54000', 'P0001')
      then 'rejected'
    when p_sqlstate in ('02000', '23503', '55P03', '42P01', '42703', '42883', '42804') then 'held'
  end
$$;

-- What a transaction leaves behind: versions {key: version, or null when the row is gone}, and rows
-- {key: the columns that an insert left to defaults}. Read at the end, because triggers may have
-- moved a row again after its own statement.
create or replace function sync.what_is_left(
  p_ops jsonb, out p_versions jsonb, out p_rows jsonb
) language plpgsql set search_path = '' as $$
declare
  v_op jsonb;
  v_version text;
  v_rest jsonb;
begin
  p_versions := '{}';
  p_rows := '{}';
  for v_op in select o from jsonb_array_elements(p_ops) o loop
    v_version := null;
    v_rest := null;
    execute v_op ->> 'left_sql' into v_version, v_rest using v_op ->> 'id';
    p_versions := p_versions || jsonb_build_object(v_op ->> 'key', v_version);
    if v_rest <> '{}' then
      p_rows := p_rows || jsonb_build_object(v_op ->> 'key', v_rest);
    end if;
  end loop;
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

-- What a transaction's row set was: {key: null} for each row it writes. Its rows are shown to the
-- author when it comes to nothing.
create or replace function sync.row_keys(p_ops jsonb) returns jsonb
language sql immutable set search_path = '' as $$
  select coalesce(jsonb_object_agg((o ->> 'table') || '/' || (o ->> 'id'), null), '{}')
    from jsonb_array_elements(p_ops) o
$$;

-- The transaction that stands for one in the end: edits replace edits.
create or replace function sync.successor_of(p_txn_id uuid) returns uuid
language sql stable set search_path = '' as $$
  with recursive x (txn_id) as (
    select p_txn_id
    union select l.replaced_by from x join sync.ledger l on l.txn_id = x.txn_id
      where l.replaced_by is not null)
  select x.txn_id from x left join sync.ledger l on l.txn_id = x.txn_id
    where l.replaced_by is null limit 1
$$;

-- This position of a log is answered by a transaction that came through another log.
create or replace function sync.note_alias(
  p_log_id uuid, p_transaction jsonb, p_other_log uuid
) returns void language plpgsql set search_path = '' as $$
begin
  if p_log_id <> p_other_log then
    insert into sync.aliases (log_id, seq, txn_id)
      values (p_log_id, (p_transaction ->> 'seq')::bigint, (p_transaction ->> 'txn_id')::uuid)
      on conflict do nothing;
  end if;
end $$;

-- What is remembered of a transaction; null when it is new. Whoever sends another author's txn_id
-- hears what they would hear of a hidden row. `p_retry`: it is the parked copy that asks.
create or replace function sync.known(
  p_log_id uuid, p_transaction jsonb, p_retry boolean
) returns jsonb language plpgsql set search_path = '' as $$
declare
  v_user constant uuid := (p_transaction ->> 'user_id')::uuid;
  v_known sync.ledger;
  v_parked sync.parked;
begin
  select l.* into v_known from sync.ledger l where l.txn_id = (p_transaction ->> 'txn_id')::uuid;
  if found then
    if v_known.user_id <> v_user then
      return jsonb_build_object('verdict', 'rejected', 'sqlstate', '42501',
        'message', 'the row is not the author''s');
    elsif v_known.digest is distinct from p_transaction ->> 'digest' then
      return jsonb_build_object('verdict', 'rejected', 'sqlstate', 'SYT01',
        'message', 'this txn_id was applied with other content');
    end if;
    perform sync.note_alias(p_log_id, p_transaction, v_known.log_id);
    if v_known.verdict = 'applied' then
      return jsonb_build_object('verdict', 'duplicate', 'versions', v_known.versions,
        'met', v_known.met, 'defaults', coalesce(v_known.defaults, '{}'),
        'rows', sync.see(v_user, sync.reads_for(v_known.versions)));
    elsif v_known.replaced_by is not null and exists (select from sync.parked p
        where p.txn_id = sync.successor_of(v_known.txn_id) and p.state <> 'superseded') then
      return jsonb_build_object('verdict', 'parked', 'state', 'dead',
        'message', 'edited; the edited transaction still waits');
    end if;
    return jsonb_build_object('verdict', 'parked', 'state', 'discarded',
      'rows', sync.see(v_user, sync.reads_for(v_known.versions)));
  elsif p_retry then
    return null;
  end if;
  select p.* into v_parked from sync.parked p
    where p.txn_id = (p_transaction ->> 'txn_id')::uuid
    order by p.user_id <> v_user limit 1;
  if not found then
    return null;
  elsif v_parked.user_id <> v_user then
    return jsonb_build_object('verdict', 'rejected', 'sqlstate', '42501',
      'message', 'the row is not the author''s');
  elsif v_parked.digest is distinct from p_transaction ->> 'digest' then
    return jsonb_build_object('verdict', 'rejected', 'sqlstate', 'SYT01',
      'message', 'this txn_id was parked with other content');
  end if;
  perform sync.note_alias(p_log_id, p_transaction, v_parked.log_id);
  return jsonb_build_object('verdict', 'parked', 'state', v_parked.state,
    'blocked_by', v_parked.blocked_by, 'sqlstate', v_parked.sqlstate, 'op', v_parked.op,
    'message', v_parked.message,
    'rows', case when v_parked.state = 'superseded'
      then sync.see(v_user, sync.reads_for(sync.row_keys(v_parked.item -> 'ops'))) else '{}' end);
end $$;

-- Is this position of the log taken by another transaction? Then the log has forked: its file was
-- restored from a backup and written to again.
create or replace function sync.seq_taken(p_log_id uuid, p_seq bigint) returns boolean
language sql stable set search_path = '' as $$
  select exists (select from sync.ledger l where l.log_id = p_log_id and l.seq = p_seq)
    or exists (select from sync.parked p where p.log_id = p_log_id and p.seq = p_seq)
    or exists (select from sync.aliases a where a.log_id = p_log_id and a.seq = p_seq)
$$;

-- Has a transaction come to nothing: superseded, or discarded and not edited into one that waits?
create or replace function sync.came_to_nothing(p_txn_id uuid, p_user uuid) returns boolean
language sql stable set search_path = '' as $$
  select exists (select from sync.parked p
      where p.txn_id = p_txn_id and p.user_id = p_user and p.state = 'superseded')
    or exists (select from sync.ledger l
      where l.txn_id = p_txn_id and l.user_id = p_user and l.verdict = 'discarded'
        and not exists (select from sync.parked p
          where p.txn_id = sync.successor_of(p_txn_id) and p.state <> 'superseded'))
$$;

-- What is still parked of what a transaction waited for that has come to nothing since.
create or replace function sync.left_waiting(p_txn_id uuid, p_user uuid) returns setof uuid
language sql stable set search_path = '' as $$
  with recursive x (txn_id) as (
    select p_txn_id
    union select a::uuid from x cross join lateral (
        select l.after from sync.ledger l
          where l.txn_id = x.txn_id and l.user_id = p_user and l.replaced_by is null
        union all select jsonb_build_array(l.replaced_by) from sync.ledger l
          where l.txn_id = x.txn_id and l.user_id = p_user and l.replaced_by is not null
        union all select p.item -> 'after' from sync.parked p
          where p.txn_id = x.txn_id and p.user_id = p_user and p.state = 'superseded') y (after)
      cross join jsonb_array_elements_text(y.after) a)
  select p.txn_id from x join sync.parked p on p.txn_id = x.txn_id
    where x.txn_id <> p_txn_id and p.user_id = p_user and p.state <> 'superseded'
$$;

-- The transaction as it is looked at: behind an edit that still waits instead of behind what that
-- edit replaced, and behind what one that has come to nothing waited for: its sender, who may not have
-- heard of that, names only the nearest.
create or replace function sync.with_successors(p_transaction jsonb) returns jsonb
language sql stable set search_path = '' as $$
  with x as (
    select a, n, (select to_jsonb(p.txn_id) from sync.ledger l
        join sync.parked p on p.txn_id = sync.successor_of(l.txn_id) and p.state <> 'superseded'
      where l.txn_id = (a #>> '{}')::uuid and l.replaced_by is not null
        and l.user_id = (p_transaction ->> 'user_id')::uuid limit 1) as successor
    from jsonb_array_elements(p_transaction -> 'after') with ordinality y (a, n)),
  found as (
    select coalesce(x.successor, x.a) as a, x.n from x
    union all select to_jsonb(w), x.n from x cross join lateral sync.left_waiting(
        (x.a #>> '{}')::uuid, (p_transaction ->> 'user_id')::uuid) w
      where x.successor is null)
  select p_transaction || jsonb_build_object('after', coalesce(jsonb_agg(f.a order by f.n), '[]'))
    from (select a, min(n) as n from found group by a) f
$$;

-- The predecessor that a transaction must wait for; null when all have been applied or have come to
-- nothing. A delete doesn't wait for what is parked: that work is superseded by it.
create or replace function sync.blocker_of(p_transaction jsonb) returns text
language sql stable set search_path = '' as $$
  select a from jsonb_array_elements_text(p_transaction -> 'after') a
    where not exists (select from sync.ledger l where l.txn_id = a::uuid
        and l.user_id = (p_transaction ->> 'user_id')::uuid and l.verdict = 'applied')
      and not sync.came_to_nothing(a::uuid, (p_transaction ->> 'user_id')::uuid)
      and not (
        exists (select from sync.parked p where p.txn_id = a::uuid
          and p.user_id = (p_transaction ->> 'user_id')::uuid)
        and not exists (select from jsonb_array_elements(p_transaction -> 'ops') o
          where o ->> 'kind' <> 'delete')
        and p_transaction -> 'ops' <> '[]')
    limit 1
$$;

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

-- Children of a row that go with it although its deleter didn't know them, or not as they are now:
-- {key: row}. `children` of the op names those that were known, with the version they had (null:
-- the author's own change was still under way).
create or replace function sync.strange_children(p_op jsonb, p_user uuid) returns jsonb
language plpgsql set search_path = '' as $$
declare
  v_child sync.tables;
  v_found record;
  v_key text;
  v_strange jsonb := '{}';
begin
  for v_child in select c.* from sync.tables c where c.parent_name = p_op ->> 'table' loop
    for v_found in execute format(
      'select t.%1$I::text as id, to_jsonb(t) as r, t.%2$I is distinct from'
      ' ($3 -> ''children'' ->> (%3$L || ''/'' || t.%1$I::text))::%4$s as moved'
      ' from %5$I.%3$I t where t.%6$I::text = $1 and t.%7$I = $2 order by t.%1$I',
      v_child.key_column, v_child.version_column, v_child.name, v_child.version_type,
      v_child.schema_name, v_child.parent_column, v_child.owner_column)
      using p_op ->> 'id', p_user, p_op
    loop
      v_key := v_child.name || '/' || v_found.id;
      if not (p_op -> 'children') ? v_key
          or (p_op -> 'children' ->> v_key is not null and v_found.moved) then
        v_strange := v_strange || jsonb_build_object(v_key, v_found.r);
      end if;
      v_strange := v_strange || sync.strange_children(jsonb_build_object(
        'table', v_child.name, 'id', v_found.id, 'children', p_op -> 'children'), p_user);
    end loop;
  end loop;
  return v_strange;
end $$;

-- Conflict records of a transaction, once however often it is delivered.
create or replace function sync.record_conflicts(
  p_log_id uuid, p_transaction jsonb, p_records jsonb
) returns void language sql set search_path = '' as $$
  insert into sync.conflicts (txn_id, log_id, seq, user_id, table_name, row_id, columns, base, mine,
      theirs, theirs_version, policy, outcome, note, through)
    select (p_transaction ->> 'txn_id')::uuid, p_log_id, (p_transaction ->> 'seq')::bigint,
      (p_transaction ->> 'user_id')::uuid, r ->> 'table', r ->> 'id',
      array(select jsonb_array_elements_text(coalesce(r -> 'columns', '[]'))),
      r -> 'base', r -> 'mine', r -> 'theirs', r ->> 'theirs_version',
      coalesce(r ->> 'policy', 'merge'), r ->> 'outcome', r ->> 'note', (r ->> 'through')::uuid
    from jsonb_array_elements(coalesce(p_records, '[]')) r
    on conflict (txn_id, user_id, table_name, row_id, outcome) where resolved_at is null do nothing
$$;

-- What follows from an effect: deleted rows take parked work of their author with them, rows that
-- came back are no longer dead.
create or replace function sync.settle_around(
  p_user uuid, p_ops jsonb, p_versions jsonb, p_since timestamptz
) returns void language plpgsql set search_path = '' as $$
declare
  v_gone text[];
begin
  if exists (select from jsonb_array_elements(p_ops) o where o ->> 'kind' = 'delete') then
    select coalesce(array_agg(t.table_name || '/' || t.row_id), '{}')
        || array(select o ->> 'key' from jsonb_array_elements(p_ops) o where o ->> 'kind' = 'delete')
      into v_gone from sync.tombstones t where t.user_id = p_user and t.deleted_at >= p_since;
    with superseded as (
      update sync.parked p set state = 'superseded', changed_at = clock_timestamp()
        where p.user_id = p_user and p.state <> 'superseded' and p.keys && v_gone
        returning p.txn_id)
    update sync.conflicts c set resolution = 'discarded', resolved_at = clock_timestamp()
      from superseded s where c.txn_id = s.txn_id and c.outcome = 'manual' and c.resolved_at is null;
  end if;
  delete from sync.tombstones t using jsonb_array_elements(p_ops) o
    where o ->> 'kind' = 'insert' and t.table_name = o ->> 'table' and t.row_id = o ->> 'id'
      and p_versions ->> (o ->> 'key') is not null;
end $$;

-- One transaction: its verdict without the txn_id. `p_floor` null: a parked copy is tried again, which
-- neither its own parking nor the floor may stop.
create or replace function sync.apply_transaction(
  p_log_id uuid, p_floor bigint, p_transaction jsonb, p_chain jsonb
) returns jsonb language plpgsql set search_path = '' as $$
declare
  v_txn_id constant uuid := (p_transaction ->> 'txn_id')::uuid;
  v_user constant uuid := (p_transaction ->> 'user_id')::uuid;
  v_seq constant bigint := (p_transaction ->> 'seq')::bigint;
  v_retry constant boolean := p_floor is null;
  v_began timestamptz;
  v_known jsonb;
  v_blocker text;
  v_ops jsonb;
  v_look jsonb := '{"stale": []}';
  v_strange jsonb;
  v_records jsonb := coalesce(p_transaction -> 'records', '[]');
  v_versions jsonb;
  v_rows jsonb;
  v_state text;
  v_message text;
  v_verdict text;
  v_op jsonb;
  v_index int;
  v_count bigint;
  v_gone boolean;
begin
  v_known := sync.known(p_log_id, p_transaction, v_retry);
  if v_known is not null then
    return v_known;
  elsif v_seq <= p_floor then
    return jsonb_build_object('verdict', 'fenced',
      'message', 'older than the ledger remembers; it may have been applied');
  elsif not v_retry and sync.seq_taken(p_log_id, v_seq) then
    return jsonb_build_object('verdict', 'rejected', 'sqlstate', 'SYT02',
      'message', 'this seq of the log was used by another transaction');
  end if;
  p_transaction := sync.with_successors(p_transaction);
  v_blocker := sync.blocker_of(p_transaction);
  if v_blocker is not null then
    return jsonb_build_object('verdict', 'held', 'blocked_by', v_blocker);
  end if;

  begin
    v_ops := sync.prepare(p_transaction, p_chain);
    v_look := sync.look(v_ops, v_user);
    if v_look -> 'stale' = '[]' then
      v_index := (v_look ->> 'absent')::int;
      if v_index is not null then
        raise exception 'the row isn''t there' using errcode = '02000';
      end if;
      for v_op in select o from jsonb_array_elements(v_ops) o
          where o ->> 'kind' = 'delete' and o ? 'children' loop
        v_strange := sync.strange_children(v_op, v_user);
        if v_strange <> '{}' then
          v_records := v_records || jsonb_build_array(jsonb_build_object(
            'table', v_op ->> 'table', 'id', v_op ->> 'id', 'columns', array[]::text[],
            'theirs', v_strange, 'policy', 'delete', 'outcome', 'deleted',
            'note', 'children that the deleter did not know'));
        end if;
      end loop;
      v_began := clock_timestamp();
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
      select w.p_versions, w.p_rows into v_versions, v_rows from sync.what_is_left(v_ops) w;
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
      v_look := sync.look(v_ops, v_user);
    end if;
    if v_look -> 'stale' = '[]' then
      v_known := sync.known(p_log_id, p_transaction, v_retry);
      if v_known is not null then
        return v_known;
      elsif v_state = '23503' and sync.deleted_parents(v_ops, v_user) <> '{}' then
        return jsonb_build_object('verdict', 'conflict', 'op', v_index,
          'rows', sync.deleted_parents(v_ops, v_user), 'message', 'the parent was deleted');
      end if;
      return jsonb_build_object(
        'verdict', v_verdict, 'sqlstate', v_state, 'message', v_message, 'op', v_index);
    end if;
  end;
  -- Asked again, here and above: the same transaction may have come through another container's log
  -- (an idempotency key that was retried there) and committed while this one waited for its rows.
  if v_look -> 'stale' <> '[]' then
    return coalesce(
      sync.known(p_log_id, p_transaction, v_retry), sync.conflict_for(v_user, v_look -> 'stale'));
  end if;

  -- A row that a person decided against its author: what the author built on it since didn't know
  -- that, so it must not find a version here to go on from.
  select v_versions || coalesce(jsonb_object_agg(k, null), '{}') into v_versions
    from jsonb_array_elements_text(p_transaction -> 'decided') k;
  insert into sync.ledger (txn_id, log_id, seq, user_id, digest, verdict, versions, met, defaults)
    values (v_txn_id, p_log_id, v_seq, v_user, p_transaction ->> 'digest', 'applied', v_versions,
      coalesce(p_transaction -> 'met', '{}'), nullif(v_rows, '{}'));
  perform sync.record_conflicts(p_log_id, p_transaction, v_records);
  perform sync.settle_around(v_user, v_ops, v_versions, v_began);
  return jsonb_build_object('verdict', 'applied', 'versions', v_versions, 'rows', v_rows);
end $$;

-- A verdict with every field that a reply carries.
create or replace function sync.complete(p_transaction jsonb, p_verdict jsonb) returns jsonb
language sql immutable set search_path = '' as $$
  select '{"state": null, "versions": {}, "rows": {}, "blocked_by": null, "op": null,
      "sqlstate": null, "message": null}'::jsonb
    || p_verdict || jsonb_build_object('txn_id', p_transaction -> 'txn_id')
$$;

-- Lock a log, remember its end, and return its floor. An abandoned first attempt and its retry queue
-- here instead of meeting in the middle.
create or replace function sync.enter_log(p_log_id uuid, p_acknowledged_seq bigint) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_floor bigint;
begin
  perform pg_advisory_xact_lock(hashtextextended('sync.log/' || p_log_id, 0));
  insert into sync.logs as l (log_id, acknowledged_seq)
    values (p_log_id, coalesce(p_acknowledged_seq, 0))
    on conflict (log_id) do update set
      acknowledged_seq = greatest(l.acknowledged_seq, excluded.acknowledged_seq),
      last_seen_at = clock_timestamp()
    returning l.floor_seq into v_floor;
  return v_floor;
end $$;

-- Which transactions of a run have nothing special about them: new, once, above the floor, on a free
-- position, inserts and updates only, without records, after nothing but what is applied or in the
-- run. What they need is prepared here, while still service_role; null for the others.
create or replace function sync.prepare_run(
  p_log_id uuid, p_floor bigint, p_run jsonb
) returns jsonb[] language plpgsql stable set search_path = '' as $$
begin
  return (select array_agg(case when plain then (
      select jsonb_agg(o || sync.prepare_op(o, (t ->> 'user_id')::uuid) order by m)
        from jsonb_array_elements(t -> 'ops') with ordinality y (o, m)) end order by n)
  from (
    select t, n, (t ->> 'seq')::bigint > p_floor
        and count(*) over (partition by t ->> 'txn_id') = 1
        and count(*) over (partition by t ->> 'seq') = 1
        and jsonb_array_length(t -> 'ops') > 0
        and coalesce(t -> 'records', '[]') = '[]'
        and not exists (select from jsonb_array_elements(t -> 'ops') o
          where o ->> 'kind' is distinct from 'insert' and o ->> 'kind' is distinct from 'update')
        and not exists (select from sync.ledger l where l.txn_id = (t ->> 'txn_id')::uuid)
        and not exists (select from sync.parked q where q.txn_id = (t ->> 'txn_id')::uuid)
        and not sync.seq_taken(p_log_id, (t ->> 'seq')::bigint)
        and not exists (select from jsonb_array_elements_text(t -> 'after') a
          where not p_run @> jsonb_build_array(jsonb_build_object('txn_id', a))
            and not exists (select from sync.ledger l where l.txn_id = a::uuid
              and l.user_id = (t ->> 'user_id')::uuid and l.verdict = 'applied')) as plain
    from jsonb_array_elements(p_run) with ordinality x (t, n)) z);
end $$;

-- Write down what a run has applied so far, before anything that looks at the ledger.
create or replace function sync.note_applied(
  p_log_id uuid, p_run jsonb, p_applied jsonb
) returns void language sql set search_path = '' as $$
  insert into sync.ledger (txn_id, log_id, seq, user_id, digest, verdict, versions, met, defaults)
    select (t ->> 'txn_id')::uuid, p_log_id, (t ->> 'seq')::bigint, (t ->> 'user_id')::uuid,
      t ->> 'digest', 'applied', v -> 'versions', coalesce(t -> 'met', '{}'),
      nullif(v -> 'rows', '{}')
    from jsonb_array_elements(p_run) t
    cross join lateral (select p_applied -> (t ->> 'txn_id')) x (v) where v is not null;
  delete from sync.tombstones d using jsonb_array_elements(p_run) t
    cross join jsonb_array_elements(t -> 'ops') o
    where p_applied ? (t ->> 'txn_id') and o ->> 'kind' = 'insert'
      and d.table_name = o ->> 'table' and d.row_id = o ->> 'id'
$$;

-- A run of one author's transactions: the role goes there once, and back for those that need the
-- long way. Whatever is unusual about a transaction (a row that isn't at its base, a refusal, no row
-- where one was expected) undoes its short attempt, and sync.apply_transaction decides.
create or replace function sync.apply_run(
  p_log_id uuid, p_floor bigint, p_run jsonb, inout p_chain jsonb, out p_verdicts jsonb[]
) language plpgsql set search_path = '' as $$
declare
  v_user constant uuid := (p_run -> 0 ->> 'user_id')::uuid;
  v_prepared constant jsonb[] := sync.prepare_run(p_log_id, p_floor, p_run);
  v_transaction jsonb;
  v_verdict jsonb;
  v_n int := 0;
  v_op jsonb;
  v_key text;
  v_base text;
  v_moved boolean;
  v_count bigint;
  v_version text;
  v_rest jsonb;
  v_versions jsonb;
  v_rows jsonb;
  v_met jsonb;
  v_applied jsonb := '{}';  -- since the last note
  v_done text[] := '{}';
begin
  p_verdicts := '{}';
  perform sync.enter(v_user, null);
  for v_transaction in select t from jsonb_array_elements(p_run) t loop
    v_n := v_n + 1;
    v_verdict := null;
    v_met := coalesce(v_transaction -> 'met', '{}');
    -- A predecessor in the run must have been applied in it.
    if v_prepared[v_n] is not null and not exists (
        select from jsonb_array_elements_text(v_transaction -> 'after') a
          where p_run @> jsonb_build_array(jsonb_build_object('txn_id', a)) and not a = any (v_done))
    then
      begin
        perform set_config('sync.accepted_at', coalesce(v_transaction ->> 'accepted_at', ''), true);
        set constraints all deferred;
        v_versions := '{}';
        v_rows := '{}';
        for v_op in select o from jsonb_array_elements(v_prepared[v_n]) o loop
          if v_op ? 'problem' then
            raise exception 'the long way';
          end if;
          v_key := v_op ->> 'key';
          if v_op ->> 'kind' = 'update' and not v_versions ? v_key then
            v_base := v_op ->> 'base';
            if v_base = 'chained' then
              v_base := case when p_chain -> 'met' ->> v_key
                is not distinct from v_transaction -> 'met' ->> v_key
                then p_chain -> 'versions' ->> v_key end;
            end if;
            v_moved := null;
            execute v_op ->> 'stale_sql' into v_moved using v_op ->> 'id', v_base;
            if v_moved is distinct from false then  -- null: no such row, or a hidden one
              raise exception 'the long way';
            end if;
          end if;
          execute v_op ->> 'effect_sql' using v_op ->> 'id', v_op -> 'values', v_user;
          get diagnostics v_count = row_count;
          if v_count <> 1 then
            raise exception 'the long way';
          end if;
          v_versions := v_versions || jsonb_build_object(v_key, null);
        end loop;
        set constraints all immediate;
        for v_op in select o from jsonb_array_elements(v_prepared[v_n]) o loop
          v_version := null;
          v_rest := null;
          execute v_op ->> 'left_sql' into v_version, v_rest using v_op ->> 'id';
          if v_version is null then
            raise exception 'the long way';
          end if;
          v_versions := v_versions || jsonb_build_object(v_op ->> 'key', v_version);
          if v_rest <> '{}' then
            v_rows := v_rows || jsonb_build_object(v_op ->> 'key', v_rest);
          end if;
        end loop;
        v_verdict := jsonb_build_object(
          'verdict', 'applied', 'versions', v_versions, 'rows', v_rows);
        v_applied := v_applied || jsonb_build_object(v_transaction ->> 'txn_id', v_verdict);
        v_done := v_done || (v_transaction ->> 'txn_id');
      exception when others then
        v_verdict := null;  -- no error is lost by this: the long way meets it again
      end;
    end if;
    if v_verdict is null then
      perform set_config('role', 'service_role', true);
      perform sync.note_applied(p_log_id, p_run, v_applied);
      v_applied := '{}';
      v_verdict := sync.apply_transaction(p_log_id, p_floor, v_transaction, p_chain);
      if v_verdict ->> 'verdict' = 'applied' then
        v_done := v_done || (v_transaction ->> 'txn_id');
      elsif v_verdict ->> 'verdict' = 'duplicate' then
        v_met := v_verdict -> 'met';
      end if;
      perform sync.enter(v_user, null);
    end if;
    if v_verdict ->> 'verdict' in ('applied', 'duplicate') then
      p_chain := jsonb_build_object(
        'versions', (p_chain -> 'versions') || (v_verdict -> 'versions'),
        'met', (p_chain -> 'met') - array(select jsonb_object_keys(v_verdict -> 'versions'))
          || v_met);
    end if;
    p_verdicts := p_verdicts || (
      '{"state": null, "versions": {}, "rows": {}, "blocked_by": null, "op": null,
        "sqlstate": null, "message": null}'::jsonb
      || v_verdict || jsonb_build_object('txn_id', v_transaction -> 'txn_id'));
  end loop;
  perform set_config('role', 'service_role', true);
  perform sync.note_applied(p_log_id, p_run, v_applied);
end $$;

create or replace function public.sync_apply_batch_v1(p_batch jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set timezone = 'UTC'
-- Below the client's read timeout (30 s) and the gateway's cap (60 s): the server gives up first.
-- 3 s for a lock: longer than any healthy batch holds one, and 17 s remain for the others.
set statement_timeout = '20s' set lock_timeout = '3s' as $$
declare
  v_log_id uuid;
  v_floor bigint;
  v_run jsonb;
  v_of_run jsonb[];
  v_verdicts jsonb[] := '{}';
  v_chain jsonb := '{"versions": {}, "met": {}}';
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
  v_floor := sync.enter_log(v_log_id, (p_batch ->> 'acknowledged_seq')::bigint);
  perform sync.lock_rows(p_batch -> 'transactions');
  for v_run in  -- neighbours of one author, in the order sent
    select jsonb_agg(t order by n) from (
      select t, n, n - row_number() over (partition by t ->> 'user_id' order by n) as run
      from jsonb_array_elements(p_batch -> 'transactions') with ordinality x (t, n)) y
    group by t ->> 'user_id', run order by min(n)
  loop
    select * into v_chain, v_of_run from sync.apply_run(v_log_id, v_floor, v_run, v_chain);
    v_verdicts := v_verdicts || v_of_run;
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
