-- 005 Who may do what: one policy per verb on each table, for its owner alone.
--
-- `(select auth.uid())` is evaluated once per statement instead of once per row. Grants are spelled
-- out, because new projects grant nothing by default and older ones grant too much; anon gets none.

do $$
declare
  v_table text;
  v_mine constant text := 'user_id = (select auth.uid())';
begin
  foreach v_table in array
    array['sessions', 'session_revisions', 'session_drafts', 'hole_resolutions']
  loop
    execute format('revoke all on public.%I from public, anon, authenticated', v_table);
    execute format(
      'grant select, insert, update, delete on public.%I to authenticated, service_role', v_table);

    execute format('drop policy if exists %I on public.%I', v_table || '_select', v_table);
    execute format('create policy %I on public.%I for select to authenticated using (%s)',
      v_table || '_select', v_table, v_mine);
    execute format('drop policy if exists %I on public.%I', v_table || '_insert', v_table);
    execute format('create policy %I on public.%I for insert to authenticated with check (%s)',
      v_table || '_insert', v_table, v_mine);
    execute format('drop policy if exists %I on public.%I', v_table || '_update', v_table);
    execute format(
      'create policy %I on public.%I for update to authenticated using (%s) with check (%s)',
      v_table || '_update', v_table, v_mine, v_mine);
    execute format('drop policy if exists %I on public.%I', v_table || '_delete', v_table);
    execute format('create policy %I on public.%I for delete to authenticated using (%s)',
      v_table || '_delete', v_table, v_mine);
  end loop;
end $$;

notify pgrst, 'reload schema';
