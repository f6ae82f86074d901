-- 014 What the doctor asks of the server, in one call: facts, no judgement.
--
-- Everything comes from the catalogs and from sync.tables, as service_role can read them; no user's
-- row is looked at. `syncer doctor` compares the facts with the code and its table specs.
--
--   now         the server's clock           migrations  {name: sha256}, null when applied by hand
--   functions   {name: {service_role, anon, authenticated: may it execute}}
--   tables      one object per registered table; `there` false when the table is gone
--   views       what API roles can read of registered tables past row-level security

do $$
begin
  if to_regclass('sync.schema_migrations') is not null then
    grant select on sync.schema_migrations to service_role;
  end if;
end $$;

create or replace function sync.applied_migrations() returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  v_migrations jsonb;
begin
  if to_regclass('sync.schema_migrations') is not null then
    execute 'select coalesce(jsonb_object_agg(m.name, m.sha256), ''{}'')'
      ' from sync.schema_migrations m' into v_migrations;
  end if;
  return v_migrations;
end $$;

create or replace function sync.exposed_functions() returns jsonb
language sql stable set search_path = '' as $$
  select coalesce(jsonb_object_agg(p.proname, jsonb_build_object(
      'service_role', has_function_privilege('service_role', p.oid, 'execute'),
      'anon', has_function_privilege('anon', p.oid, 'execute'),
      'authenticated', has_function_privilege('authenticated', p.oid, 'execute'))), '{}')
    from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
    where n.nspname = 'public' and p.proname like 'sync\_%'
$$;

-- Does an enabled trigger keep the version: ours of 012, or the session tables' of 006?
create or replace function sync.version_moves(p_table oid, p_name text) returns boolean
language sql stable set search_path = '' as $$
  select exists (select from pg_catalog.pg_trigger t
    join pg_catalog.pg_proc p on p.oid = t.tgfoid
    join pg_catalog.pg_namespace n on n.oid = p.pronamespace
    where t.tgrelid = p_table and t.tgenabled in ('O', 'A')
      and (t.tgtype & 23) = 23  -- for each row, before, insert, update
      and ((n.nspname = 'sync' and p.proname = 'move_version_' || p_name)
        or (n.nspname = 'public' and p.proname = 'update_updated_at_column'
          and sync.is_session_table('public', p_name))))
$$;

-- Does an enabled trigger remember deleted rows under this name, key and owner?
create or replace function sync.deletes_remembered(p_table oid, p_registered sync.tables)
returns boolean language sql stable set search_path = '' as $$
  select exists (select from pg_catalog.pg_trigger t
    join pg_catalog.pg_proc p on p.oid = t.tgfoid
    join pg_catalog.pg_namespace n on n.oid = p.pronamespace
    where t.tgrelid = p_table and t.tgenabled in ('O', 'A') and (t.tgtype & 8) = 8
      and n.nspname = 'sync' and p.proname = 'remember_deleted'
      and t.tgargs = convert_to(p_registered.name, 'UTF8') || '\x00'::bytea
        || convert_to(p_registered.key_column, 'UTF8') || '\x00'::bytea
        || convert_to(p_registered.owner_column, 'UTF8') || '\x00'::bytea)
$$;

-- {role: [verbs it may use]}. What anon has through PUBLIC counts.
create or replace function sync.granted(p_table oid) returns jsonb
language sql stable set search_path = '' as $$
  select jsonb_object_agg(r.role, array(
      select v.verb from unnest(array['select', 'insert', 'update', 'delete', 'truncate'])
        with ordinality v (verb, n)
      where has_table_privilege(r.role, p_table, v.verb) order by v.n))
    from (values ('anon'), ('authenticated'), ('service_role')) r (role)
$$;

create or replace function sync.facts_of(p_registered sync.tables) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  v_class record;
  v_parent sync.tables;
  v_parent_oid oid;
begin
  select c.oid, c.relrowsecurity into v_class
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname = p_registered.schema_name and c.relname = p_registered.name
      and c.relkind = 'r';
  if not found then
    return to_jsonb(p_registered) || jsonb_build_object('there', false,
      'built_in', sync.is_session_table(p_registered.schema_name, p_registered.name));
  end if;
  select t.* into v_parent from sync.tables t where t.name = p_registered.parent_name;
  select c.oid into v_parent_oid
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname = v_parent.schema_name and c.relname = v_parent.name;
  return to_jsonb(p_registered) || jsonb_build_object(
    'there', true,
    'built_in', sync.is_session_table(p_registered.schema_name, p_registered.name),
    'key_unique', sync.names_a_row(v_class.oid, p_registered.key_column),
    'row_security', v_class.relrowsecurity,
    'verbs_without_policy', to_jsonb(sync.verbs_without_policy(v_class.oid)),
    'slow_policies', to_jsonb(sync.slow_policies(v_class.oid)),
    'granted', sync.granted(v_class.oid),
    'columns', sync.columns_of(v_class.oid),
    'version_moves', sync.version_moves(v_class.oid, p_registered.name),
    'deletes_remembered', sync.deletes_remembered(v_class.oid, p_registered),
    'owner_indexed', sync.leads_an_index(v_class.oid, p_registered.owner_column),
    'parent_indexed', sync.leads_an_index(v_class.oid, p_registered.parent_column),
    'parent_link', sync.parent_link(v_class.oid, p_registered.parent_column,
      p_registered.owner_column, v_parent_oid, v_parent.key_column, v_parent.owner_column));
end $$;

-- Views with their owner's eyes, also those upon views, and materialised ones, which know no
-- row-level security.
create or replace function sync.unguarded_views() returns jsonb
language sql stable set search_path = '' as $$
  with recursive readers (oid) as (
    select c.oid from sync.tables t
      join pg_catalog.pg_namespace n on n.nspname = t.schema_name
      join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = t.name
    union
    select w.ev_class from readers r
      join pg_catalog.pg_depend d on d.refobjid = r.oid
        and d.refclassid = 'pg_catalog.pg_class'::regclass
        and d.classid = 'pg_catalog.pg_rewrite'::regclass
      join pg_catalog.pg_rewrite w on w.oid = d.objid)
  select coalesce(jsonb_agg(format('%I.%I', n.nspname, v.relname)), '[]')
    from readers r
    join pg_catalog.pg_class v on v.oid = r.oid and v.relkind in ('v', 'm')
    join pg_catalog.pg_namespace n on n.oid = v.relnamespace
    where not coalesce((select o.option_value::boolean from pg_options_to_table(v.reloptions) o
        where o.option_name = 'security_invoker'), false)
      and (has_table_privilege('anon', v.oid, 'select')
        or has_table_privilege('authenticated', v.oid, 'select'))
$$;

create or replace function public.sync_doctor_v1(p jsonb) returns jsonb
language plpgsql security invoker
set search_path = '' set timezone = 'UTC' set statement_timeout = '20s' as $$
begin
  perform sync.guard();
  return jsonb_build_object(
    'protocol', 1,
    'now', to_jsonb(clock_timestamp()),
    'server_version', current_setting('server_version'),
    'migrations', sync.applied_migrations(),
    'functions', sync.exposed_functions(),
    'tables', (select coalesce(jsonb_agg(sync.facts_of(t) order by t.position), '[]')
      from sync.tables t),
    'views', sync.unguarded_views());
end $$;

revoke all on function public.sync_doctor_v1(jsonb) from public, anon, authenticated;
grant execute on function public.sync_doctor_v1(jsonb) to service_role;

revoke all on function
  sync.applied_migrations(), sync.exposed_functions(), sync.version_moves(oid, text),
  sync.deletes_remembered(oid, sync.tables), sync.granted(oid), sync.facts_of(sync.tables),
  sync.unguarded_views()
  from public, anon, authenticated;
grant execute on function
  sync.applied_migrations(), sync.exposed_functions(), sync.version_moves(oid, text),
  sync.deletes_remembered(oid, sync.tables), sync.granted(oid), sync.facts_of(sync.tables),
  sync.unguarded_views(), sync.is_session_table(text, text)
  to service_role;

notify pgrst, 'reload schema';
