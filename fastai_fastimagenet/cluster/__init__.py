"Machines for a run: these here, those reached over ssh, those rented from AWS"
