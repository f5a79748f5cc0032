"""Everything that runs on Ray: actors, controller, scheduler, journal, frontend. The only room that imports Ray."""
