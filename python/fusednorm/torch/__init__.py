from fusednorm.torch.modules import *
