"""What a run tells: printed lines, the output folder's files, pictures and the report page."""
