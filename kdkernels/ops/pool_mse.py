import torch
def pool_mse(s, t, *, mask=None, backend=None):
    ps = s if s.dim()==2 else s.flatten(2).mean(2); pt = t if t.dim()==2 else t.flatten(2).mean(2)
    m = (s-t).float().square().flatten(1).mean(1)
    if mask is not None:
        ps, pt, m = torch.where(mask[:,None],ps,0), torch.where(mask[:,None],pt,0), torch.where(mask,m,0)
    return ps, pt, m
