-- 012 A user's own table joins the sync in one call, made by the project's owner:
--
--   select public.sync_register_table('public.projects');
--   select public.sync_register_table('public.notes', p_parent_column => 'project_id',
--     p_parent => 'public.projects');
--
-- check everything → remember it in sync.tables → grants → two triggers → say what could be better
--
-- A table that would turn every write into a dead letter (no policy for a verb, no key, no version)
-- is refused, with the field and the remedy; nothing is half done. Calling it again is harmless, and
-- with other arguments it changes the registration. DDL needs the table's owner, so no API role may
-- execute it.
--
-- The version. Delivery compares `updated_at` for equality, so it must move whenever a user's column
-- changes and only then, strictly. Whether a table's own trigger does that can't be seen from
-- outside, so registration adds one that fires last (zz_sync_version) and has the final word; an own
-- trigger that sets it to now() becomes harmless.

-- -- what can be seen of a table; the doctor (014) asks the same --

-- {column: {type, domain, enum, nullable, default, generated}}. `generated`: can't be written.
create or replace function sync.columns_of(p_table oid) returns jsonb
language sql stable set search_path = '' as $$
  select coalesce(jsonb_object_agg(a.attname, jsonb_build_object(
      'type', format_type(case t.typtype when 'd' then t.typbasetype else t.oid end, null),
      'domain', t.typtype = 'd', 'enum', t.typtype = 'e', 'nullable', not a.attnotnull,
      'default', a.atthasdef or a.attidentity <> '',
      'generated', a.attgenerated <> '' or a.attidentity = 'a')), '{}')
    from pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid
    where a.attrelid = p_table and a.attnum > 0 and not a.attisdropped
$$;

-- Can this column alone name a row?
create or replace function sync.names_a_row(p_table oid, p_column text) returns boolean
language sql stable set search_path = '' as $$
  select exists (select from pg_catalog.pg_index i
    join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
    where i.indrelid = p_table and a.attname = p_column and a.attnotnull and i.indnkeyatts = 1
      and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null)
$$;

-- Does an index begin with this column?
create or replace function sync.leads_an_index(p_table oid, p_column text) returns boolean
language sql stable set search_path = '' as $$
  select exists (select from pg_catalog.pg_index i
    join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
    where i.indrelid = p_table and a.attname = p_column and i.indisvalid and i.indpred is null)
$$;

-- The policies that a signed-in user meets on a table.
create or replace function sync.user_policies(p_table oid) returns setof pg_catalog.pg_policy
language sql stable set search_path = '' as $$
  select p.* from pg_catalog.pg_policy p where p.polrelid = p_table
    and (0 = any (p.polroles)
      or (select r.oid from pg_catalog.pg_roles r where r.rolname = 'authenticated')
        = any (p.polroles))
$$;

-- Verbs that no policy allows. Restrictive policies only take away.
create or replace function sync.verbs_without_policy(p_table oid) returns text[]
language sql stable set search_path = '' as $$
  select coalesce(array_agg(v.verb order by v.n), '{}')
    from (values (1, 'select', 'r'), (2, 'insert', 'a'), (3, 'update', 'w'), (4, 'delete', 'd'))
      v (n, verb, code)
    where not exists (select from sync.user_policies(p_table) p
      where p.polpermissive and p.polcmd::text in (v.code, '*'))
$$;

-- Policies that evaluate auth.uid() once per row instead of once per statement.
create or replace function sync.slow_policies(p_table oid) returns text[]
language sql stable set search_path = '' as $$
  select coalesce(array_agg(p.polname::text order by p.polname), '{}')
    from sync.user_policies(p_table) p
    where strpos(replace(
      concat(pg_get_expr(p.polqual, p.polrelid), ' ', pg_get_expr(p.polwithcheck, p.polrelid)),
      '( SELECT auth.uid() AS uid)', ''), 'auth.uid()') > 0
$$;

-- The foreign key from a child to its parent's key: {cascades, binds_owner}, or null without one.
create or replace function sync.parent_link(
  p_child oid, p_column text, p_child_owner text, p_parent oid, p_key text, p_parent_owner text
) returns jsonb language sql stable set search_path = '' as $$
  select jsonb_build_object('cascades', bool_and(f.cascades), 'binds_owner', bool_or(f.binds_owner))
    from (select c.confdeltype = 'c' as cascades,
        bool_or(a.attname = p_column and b.attname = p_key) as to_key,
        bool_or(a.attname = p_child_owner and b.attname = p_parent_owner) as binds_owner
      from pg_catalog.pg_constraint c
      cross join unnest(c.conkey, c.confkey) k (here, there)
      join pg_catalog.pg_attribute a on a.attrelid = c.conrelid and a.attnum = k.here
      join pg_catalog.pg_attribute b on b.attrelid = c.confrelid and b.attnum = k.there
      where c.contype = 'f' and c.conrelid = p_child and c.confrelid = p_parent
      group by c.oid) f
    where f.to_key
    having count(*) > 0
$$;

-- -- the checks; each raises with the field and the remedy --

create or replace function sync.refuse_table(
  p_table regclass, p_field text, p_reason text, p_remedy text, p_sqlstate text default '42P16'
) returns void language plpgsql set search_path = '' as $$
begin
  raise exception using errcode = p_sqlstate, column = p_field, hint = p_remedy,
    message = format('%s can''t be registered: %s %s', p_table, p_field, p_reason);
end $$;

create or replace function sync.is_session_table(p_schema text, p_name text) returns boolean
language sql immutable set search_path = '' as $$
  select p_schema = 'public'
    and p_name in ('sessions', 'session_revisions', 'session_drafts', 'hole_resolutions')
$$;

create or replace function sync.check_table(p_table regclass) returns void
language plpgsql set search_path = '' as $$
declare
  v_table record;
  v_other text;
begin
  select c.relname as name, n.nspname as schema, c.relkind, c.relispartition, c.relpersistence,
      octet_length(c.relname::text) as bytes
    into v_table from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where c.oid = p_table;
  select t.schema_name into v_other from sync.tables t
    where t.name = v_table.name and t.schema_name <> v_table.schema;
  if v_table.name is null then
    perform sync.refuse_table(p_table, 'p_table', 'names no table', 'name it as schema.table',
      '22023');
  elsif v_table.relkind <> 'r' or v_table.relispartition or v_table.relpersistence <> 'p' then
    perform sync.refuse_table(p_table, 'p_table', 'is no ordinary table',
      'views, partitions, foreign, temporary and unlogged tables can''t be synchronised');
  elsif v_table.schema in ('pg_catalog', 'information_schema', 'sync')
      or sync.is_session_table(v_table.schema, v_table.name) then
    perform sync.refuse_table(p_table, 'p_table', 'belongs to the system',
      'its own migrations look after it');
  elsif v_table.bytes > 50 or strpos(v_table.name, '/') > 0 then
    perform sync.refuse_table(p_table, 'p_table', 'has a name over 50 bytes or with a slash',
      'rename the table');
  elsif v_other is not null then
    perform sync.refuse_table(p_table, 'p_table',
      format('shares its name with a registered table of schema %I', v_other),
      'ops name tables without a schema: rename one, or unregister the other (if it was dropped: '
      || format('delete from sync.tables where name = %L)', v_table.name));
  elsif exists (select from (values ('authenticated'), ('service_role')) r (name)
      where not has_schema_privilege(r.name, v_table.schema, 'usage')) then
    perform sync.refuse_table(p_table, 'p_table', 'is in a schema that the API''s roles may not use',
      format('grant usage on schema %I to authenticated, service_role', v_table.schema));
  end if;
end $$;

-- Returns the type that ids are cast to.
create or replace function sync.check_key(p_table regclass, p_key text) returns text
language plpgsql set search_path = '' as $$
declare
  v_column constant jsonb := sync.columns_of(p_table) -> p_key;
  v_type constant text := v_column ->> 'type';
begin
  if v_column is null then
    perform sync.refuse_table(p_table, 'p_key', format('column %I doesn''t exist', p_key),
      'name the column of the primary key', '22023');
  elsif v_type not in ('uuid', 'text', 'character varying') or (v_column ->> 'domain')::boolean
      or (v_column ->> 'generated')::boolean then
    perform sync.refuse_table(p_table, 'p_key', format('column %I must be an ordinary uuid, text'
      ' or varchar', p_key),
      'keys are made where the row is made, before the server sees it: use a uuid');
  elsif not sync.names_a_row(p_table, p_key) then
    perform sync.refuse_table(p_table, 'p_key',
      format('column %I alone isn''t a primary key, nor unique and not null', p_key),
      format('alter table %s add primary key (%I); composite keys aren''t supported: keep yours as'
        ' a unique constraint beside it', p_table, p_key));
  end if;
  return case v_type when 'uuid' then 'uuid' else 'text' end;
end $$;

create or replace function sync.check_columns(p_table regclass, p_owner text, p_version text)
returns void language plpgsql set search_path = '' as $$
declare
  v_columns constant jsonb := sync.columns_of(p_table);
  v_rule record;
begin
  for v_rule in select * from (values
      ('p_owner', p_owner, 'uuid', 'with the author''s id: add %I uuid not null default auth.uid()'),
      ('p_version', p_version, 'timestamp with time zone',
        'that moves with each change: add %I timestamptz not null default clock_timestamp()'))
      r (field, name, type, purpose) loop
    if v_columns -> v_rule.name is null or v_columns -> v_rule.name ->> 'type' <> v_rule.type
        or (v_columns -> v_rule.name ->> 'domain')::boolean
        or (v_columns -> v_rule.name ->> 'generated')::boolean then
      perform sync.refuse_table(p_table, v_rule.field,
        format('column %I must be an ordinary %s', v_rule.name, v_rule.type),
        format('alter table %s: a column ' || v_rule.purpose, p_table, v_rule.name));
    end if;
  end loop;
end $$;

-- Default deny would turn every write of that kind into a dead letter, hours later.
create or replace function sync.check_access(p_table regclass) returns void
language plpgsql set search_path = '' as $$
declare
  v_missing constant text[] := sync.verbs_without_policy(p_table);
begin
  if not (select c.relrowsecurity from pg_catalog.pg_class c where c.oid = p_table) then
    perform sync.refuse_table(p_table, 'row-level security', 'is off',
      format('alter table %s enable row level security, and write its policies', p_table));
  elsif v_missing <> '{}' then
    perform sync.refuse_table(p_table, 'policies', format('for authenticated are missing: %s',
      array_to_string(v_missing, ', ')),
      'one permissive policy per verb, such as: create policy mine on … for all to authenticated'
      ' using (user_id = (select auth.uid())) with check (user_id = (select auth.uid()))');
  elsif exists (select from pg_catalog.pg_attribute a cross join aclexplode(a.attacl) x
      where a.attrelid = p_table
        and x.grantee = (select r.oid from pg_catalog.pg_roles r where r.rolname = 'authenticated'))
  then
    perform sync.refuse_table(p_table, 'column grants',
      'for authenticated exist, and a grant on the whole table would widen them',
      'revoke them, and guard those columns with a policy or a trigger instead');
  end if;
end $$;

-- Returns the parent's registered name, null without a parent.
create or replace function sync.check_parent(
  p_table regclass, p_name text, p_owner text, p_column text, p_parent regclass
) returns text language plpgsql set search_path = '' as $$
declare
  v_parent sync.tables;
begin
  if (p_column is null) <> (p_parent is null) then
    perform sync.refuse_table(p_table, 'p_parent', 'and p_parent_column go together',
      'give both or neither', '22023');
  elsif p_parent is null then
    return null;
  end if;
  select t.* into v_parent from sync.tables t
    join pg_catalog.pg_class c on c.oid = p_parent and c.relname = t.name
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace and n.nspname = t.schema_name;
  if v_parent.name is null then
    perform sync.refuse_table(p_table, 'p_parent', format('%s isn''t registered', p_parent),
      format('first: select public.sync_register_table(%L)', p_parent));
  elsif exists (
      with recursive above (name) as (
        select v_parent.name
        union select t.parent_name from sync.tables t join above a on a.name = t.name
          where t.parent_name is not null)
      select from above where name = p_name) then
    perform sync.refuse_table(p_table, 'p_parent', format('%s hangs on this table', p_parent),
      'parents must not form a cycle: leave p_parent out');
  elsif sync.columns_of(p_table) -> p_column is null then
    perform sync.refuse_table(p_table, 'p_parent_column', format('%I doesn''t exist', p_column),
      'name the column of the foreign key', '22023');
  elsif sync.parent_link(p_table, p_column, p_owner, p_parent, v_parent.key_column,
      v_parent.owner_column) is null then
    perform sync.refuse_table(p_table, 'p_parent_column',
      format('%I has no foreign key to %s (%I)', p_column, p_parent, v_parent.key_column),
      format('alter table %s add foreign key (%I) references %s (%I) on delete cascade',
        p_table, p_column, p_parent, v_parent.key_column));
  end if;
  return v_parent.name;
end $$;

-- -- what registration does --

-- Parents before children: locks are taken in this order. Who stands before its parent goes to the
-- end, and its own children after it.
create or replace function sync.order_tables() returns void
language plpgsql set search_path = '' as $$
declare
  v_name text;
begin
  loop
    select c.name into v_name from sync.tables c join sync.tables p on p.name = c.parent_name
      where c.position < p.position order by c.position limit 1;
    exit when not found;
    update sync.tables t set position = (select max(m.position) + 1 from sync.tables m)
      where t.name = v_name;
  end loop;
end $$;

-- One function per table, so that the columns are static in it. Generated columns are still empty in
-- NEW when it fires. *<> compares the stored bytes: `distinct` takes 1 and 1.0 in a jsonb for equal.
create or replace function sync.install_triggers(p_table regclass, p_registered sync.tables)
returns void language plpgsql set search_path = '' as $$
declare
  v_function constant text := format('sync.%I', 'move_version_' || p_registered.name);
  v_kept constant text := (
    select string_agg(format('  v_authored.%1$I := old.%1$I;', a.attname), e'\n')
    from pg_catalog.pg_attribute a where a.attrelid = p_table and not a.attisdropped
      and (a.attname = p_registered.version_column or a.attgenerated = 's'));
begin
  execute format('create or replace function %s() returns trigger'
    ' language plpgsql set search_path = '''' as %L', v_function, format($body$
declare
  v_authored record;
begin
  if tg_op = 'INSERT' then
    new.%1$I := clock_timestamp();
    return new;
  end if;
  v_authored := new;
%2$s
  new.%1$I := old.%1$I;
  if v_authored *<> old then
    new.%1$I := greatest(clock_timestamp(), old.%1$I + interval '1 microsecond');
  end if;
  return new;
end $body$, p_registered.version_column, v_kept));
  execute format('revoke all on function %s() from public, anon, authenticated, service_role',
    v_function);
  execute format('create or replace trigger zz_sync_version before insert or update on %s'
    ' for each row execute function %s()', p_table, v_function);
  execute format('create or replace trigger sync_remember_deleted after delete on %s'
    ' referencing old table as old_rows for each statement'
    ' execute function sync.remember_deleted(%L, %L, %L)', p_table, p_registered.name,
    p_registered.key_column, p_registered.owner_column);
end $$;

-- Nothing to anon, and no more than the four verbs to anybody: TRUNCATE knows no row-level security.
-- A serial column asks its writer for the sequence.
create or replace function sync.grant_table(p_table regclass) returns void
language plpgsql set search_path = '' as $$
declare
  v_sequence text;
begin
  execute format('revoke all on %s from public, anon, authenticated', p_table);
  execute format('grant select, insert, update, delete on %s to authenticated, service_role',
    p_table);
  for v_sequence in
    select pg_get_serial_sequence(p_table::text, a.attname) from pg_catalog.pg_attribute a
      where a.attrelid = p_table and a.attnum > 0 and not a.attisdropped and a.attidentity = ''
  loop
    continue when v_sequence is null;
    execute format('grant usage on sequence %s to authenticated', v_sequence);
  end loop;
end $$;

-- What works but could be better.
create or replace function sync.table_warnings(
  p_table regclass, p_registered sync.tables, p_parent regclass
) returns text[] language sql stable set search_path = '' as $$
  select array_remove(array[
    case when not (l.link ->> 'cascades')::boolean then format(
      'the foreign key on %I has no ON DELETE CASCADE: deleting a parent that still has children'
      ' is held until they are gone', p_registered.parent_column) end,
    case when not (l.link ->> 'binds_owner')::boolean then format(
      'the foreign key on %I doesn''t bind the owner: a user can hang rows on somebody else''s'
      ' parent; reference key and owner together', p_registered.parent_column) end,
    case when not sync.leads_an_index(p_table, p_registered.owner_column) then format(
      'no index on %I: each policy check reads the whole table', p_registered.owner_column) end,
    case when p_parent is not null
        and not sync.leads_an_index(p_table, p_registered.parent_column) then format(
      'no index on %I: each delete of a parent reads the whole table',
      p_registered.parent_column) end,
    case when sync.slow_policies(p_table) <> '{}' then format(
      'policies call auth.uid() once per row, write (select auth.uid()): %s',
      array_to_string(sync.slow_policies(p_table), ', ')) end,
    case when exists (select from pg_catalog.pg_trigger t where t.tgrelid = p_table
        and (t.tgtype & 3) = 3 and t.tgname > 'zz_sync_version' collate "C") then
      'a row trigger fires after zz_sync_version and could undo it: give it an earlier name' end
    ], null)
  from (select sync.parent_link(p_table, p_registered.parent_column, p_registered.owner_column,
      p_parent, t.key_column, t.owner_column) as link
    from (values (1)) one (n) left join sync.tables t on t.name = p_registered.parent_name) l
$$;

-- Idempotent; with other arguments it changes the registration. Raises 22023 for an argument, 42P16
-- for a table that must change first, and names the field (as `column`) and the remedy (as hint).
create or replace function public.sync_register_table(
  p_table regclass, p_key text default 'id', p_owner text default 'user_id',
  p_version text default 'updated_at', p_parent_column text default null,
  p_parent regclass default null
) returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  v_name constant text := (select c.relname from pg_catalog.pg_class c where c.oid = p_table);
  v_key_type text;
  v_parent text;
  v_registered sync.tables;
begin
  lock table sync.tables in share row exclusive mode;  -- positions are given out one by one
  perform sync.check_table(p_table);
  v_key_type := sync.check_key(p_table, p_key);
  perform sync.check_columns(p_table, p_owner, p_version);
  perform sync.check_access(p_table);
  v_parent := sync.check_parent(p_table, v_name, p_owner, p_parent_column, p_parent);
  if exists (select from sync.tables c join sync.tables t on t.name = c.parent_name
      where t.name = v_name and t.key_column <> p_key) then
    perform sync.refuse_table(p_table, 'p_key', 'can''t change while children are registered',
      'unregister the children, change it, register them again');
  end if;

  insert into sync.tables as t (name, position, schema_name, key_column, key_type, owner_column,
      version_column, version_type, parent_column, parent_name, server_owned)
    select v_name, (select coalesce(max(m.position), 0) + 1 from sync.tables m), n.nspname, p_key,
      v_key_type, p_owner, p_version, 'timestamptz', p_parent_column, v_parent,
      -- A value for one of these would fail with an error that belongs to the whole call.
      array(select k from jsonb_each(sync.columns_of(p_table)) c (k, v)
        where (v ->> 'generated')::boolean order by k)
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where c.oid = p_table
    on conflict (name) do update set
      key_column = excluded.key_column, key_type = excluded.key_type,
      owner_column = excluded.owner_column, version_column = excluded.version_column,
      version_type = excluded.version_type, parent_column = excluded.parent_column,
      parent_name = excluded.parent_name, server_owned = excluded.server_owned;
  perform sync.order_tables();
  select t.* into v_registered from sync.tables t where t.name = v_name;
  perform sync.grant_table(p_table);
  perform sync.install_triggers(p_table, v_registered);
  notify pgrst, 'reload schema';
  return jsonb_build_object('table', v_name, 'registered', true,
    'position', v_registered.position, 'key', p_key, 'key_type', v_key_type, 'owner', p_owner,
    'version', p_version, 'parent', v_parent, 'server_owned', to_jsonb(v_registered.server_owned),
    'warnings', to_jsonb(sync.table_warnings(p_table, v_registered, p_parent)));
end $$;

-- Takes the table off the list and removes our triggers; rows, grants, policies and what is
-- remembered of deliveries stay. What is sent for it afterwards is held, not lost.
create or replace function public.sync_unregister_table(p_table regclass) returns jsonb
language plpgsql security invoker set search_path = '' as $$
declare
  v_table record;
  v_children text;
begin
  lock table sync.tables in share row exclusive mode;
  select c.relname as name, n.nspname as schema into v_table
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where c.oid = p_table;
  select string_agg(c.name, ', ' order by c.position) into v_children
    from sync.tables c join sync.tables t on t.name = c.parent_name
    where t.name = v_table.name and t.schema_name = v_table.schema;
  if sync.is_session_table(v_table.schema, v_table.name) then
    raise exception '% belongs to the system', p_table using errcode = '42P16';
  elsif v_children is not null then
    raise exception '% has registered children: %', p_table, v_children
      using errcode = '42P16', hint = 'unregister them first';
  end if;
  delete from sync.tables t where t.name = v_table.name and t.schema_name = v_table.schema;
  if found then
    execute format('drop trigger if exists zz_sync_version on %s', p_table);
    execute format('drop trigger if exists sync_remember_deleted on %s', p_table);
    execute format('drop function if exists sync.%I()', 'move_version_' || v_table.name);
  end if;
  return jsonb_build_object('table', v_table.name, 'registered', false);
end $$;

revoke all on function
  public.sync_register_table(regclass, text, text, text, text, regclass),
  public.sync_unregister_table(regclass)
  from public, anon, authenticated, service_role;

revoke all on function
  sync.columns_of(oid), sync.names_a_row(oid, text), sync.leads_an_index(oid, text),
  sync.user_policies(oid), sync.verbs_without_policy(oid), sync.slow_policies(oid),
  sync.parent_link(oid, text, text, oid, text, text),
  sync.refuse_table(regclass, text, text, text, text), sync.is_session_table(text, text),
  sync.check_table(regclass), sync.check_key(regclass, text),
  sync.check_columns(regclass, text, text), sync.check_access(regclass),
  sync.check_parent(regclass, text, text, text, regclass), sync.order_tables(),
  sync.install_triggers(regclass, sync.tables), sync.grant_table(regclass),
  sync.table_warnings(regclass, sync.tables, regclass)
  from public, anon, authenticated;
grant execute on function
  sync.columns_of(oid), sync.names_a_row(oid, text), sync.leads_an_index(oid, text), sync.user_policies(oid),
  sync.verbs_without_policy(oid), sync.slow_policies(oid),
  sync.parent_link(oid, text, text, oid, text, text)
  to service_role;

notify pgrst, 'reload schema';
