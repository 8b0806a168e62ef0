"""The course: students' copies made from the instructor's files, and a grader that needs only Python."""
