"""The course: student's copies made from the instructor's files, and a grader that runs anywhere Python
does."""
