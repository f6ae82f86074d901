-- 007 Analytics. security_invoker: a view shows its reader's own rows, not its owner's view of all.

create or replace view public.session_summary with (security_invoker = true) as
select
  s.id, s.user_id, s.status, s.source, s.current_draft_version, s.revision_count, s.hole_count,
  s.created_at, s.updated_at, s.finalized_at,
  extract(epoch from (coalesce(s.finalized_at, now()) - s.created_at)) / 60 as duration_minutes,
  (select count(*) from public.session_drafts d where d.session_id = s.id) as total_drafts,
  (select count(*) from public.hole_resolutions h where h.session_id = s.id and h.applied)
    as resolved_holes
from public.sessions s;

create or replace view public.active_sessions_by_user with (security_invoker = true) as
select
  s.user_id,
  count(*) as active_count,
  avg(s.revision_count) as avg_revisions,
  avg(s.hole_count) as avg_unresolved_holes
from public.sessions s
where s.status = 'active'
group by s.user_id;

revoke all on public.session_summary, public.active_sessions_by_user
  from public, anon, authenticated;
grant select on public.session_summary, public.active_sessions_by_user
  to authenticated, service_role;

notify pgrst, 'reload schema';
