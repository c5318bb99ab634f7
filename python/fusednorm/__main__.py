import sys

from fusednorm.cli import main

sys.exit(main())
