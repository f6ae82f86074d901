"""What ships for testing applications against outages: a local Supabase, faults, drills."""
