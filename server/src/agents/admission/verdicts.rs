//! What was found out about tokens lately.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::{Refusal, ServiceAccount, token::TokenDigest};

/// Time for which a token that was accepted is not reviewed again. An agent that looks for a
/// missing server connects to those that it has many times within a few seconds.
pub(super) const ACCEPTED_LIFE: Duration = Duration::from_secs(10);
/// Time for which a token that was refused for the first time is not reviewed again; twice as long
/// after each further time. kube-apiserver may have begun to serve a moment ago, or its clock may be
/// behind the one that dated the token.
pub(super) const FIRST_REFUSED_LIFE: Duration = Duration::from_secs(2);
/// Maximum of that time. A token that stays invalid is not reviewed again for so long at once.
pub(super) const REFUSED_LIFE: Duration = Duration::from_secs(60);
/// Number of refusals after which the time is the maximum.
const MAX_REFUSALS: u32 = 5;
/// Maximum number of tokens that are remembered as accepted, and again as refused.
const MAX_VERDICTS: usize = 16 * 1024;

/// What was found out about one token.
pub(super) type Verdict = Result<ServiceAccount, Refusal>;

/// What was found out lately, by token.
#[derive(Debug, Default)]
pub(super) struct Verdicts {
    accepted: Remembered<ServiceAccount>,
    refused: Remembered<Refused>,
}

/// A refusal of a token.
#[derive(Clone, Debug)]
struct Refused {
    refusal: Refusal,
    /// Number of times in a row.
    times: u32,
}

impl Verdicts {
    /// The verdict about a token, if it is remembered.
    pub(super) fn get(&self, token: &TokenDigest, now: Instant) -> Option<Verdict> {
        let accepted = self.accepted.get(token, now).map(Ok);
        accepted.or_else(|| self.refused.get(token, now).map(|refused| Err(refused.refusal)))
    }

    /// Remembers a verdict. A token that could not be reviewed has none.
    pub(super) fn insert(&mut self, token: TokenDigest, verdict: &Verdict, now: Instant) {
        match verdict {
            Ok(account) => {
                self.refused.remove(&token);
                self.accepted.insert(token, account.clone(), now, ACCEPTED_LIFE);
            }
            Err(Refusal::NotReviewed(_) | Refusal::NoTurn(_)) => {}
            Err(refusal) => {
                let before = self.refused.last(&token).map_or(0, |refused| refused.times);
                let times = match refusal {
                    Refusal::Refused(_) => (before + 1).min(MAX_REFUSALS),
                    _ => MAX_REFUSALS,
                };
                let refused = Refused { refusal: refusal.clone(), times };
                self.refused.insert(token, refused, now, refused_life(times));
            }
        }
    }
}

/// Time for which a token that was refused so many times in a row is not reviewed again.
fn refused_life(times: u32) -> Duration {
    match times {
        MAX_REFUSALS.. => REFUSED_LIFE,
        _ => FIRST_REFUSED_LIFE * 2_u32.pow(times.saturating_sub(1)),
    }
}

/// Values by token, and until when they hold. Those that hold no longer are kept while there is room.
#[derive(Debug)]
struct Remembered<T>(HashMap<TokenDigest, (T, Instant)>);

impl<T> Default for Remembered<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Clone> Remembered<T> {
    fn get(&self, token: &TokenDigest, now: Instant) -> Option<T> {
        let (value, until) = self.0.get(token)?;
        (*until > now).then(|| value.clone())
    }

    /// The value, although it may not hold any more.
    fn last(&self, token: &TokenDigest) -> Option<&T> {
        self.0.get(token).map(|(value, _)| value)
    }

    fn remove(&mut self, token: &TokenDigest) {
        self.0.remove(token);
    }

    fn insert(&mut self, token: TokenDigest, value: T, now: Instant, life: Duration) {
        if self.0.len() >= MAX_VERDICTS {
            self.0.retain(|_, (_, until)| *until > now);
        }
        if self.0.len() < MAX_VERDICTS || self.0.contains_key(&token) {
            self.0.insert(token, (value, now + life));
        }
    }
}

#[cfg(test)]
mod tests {
    use culvert_wire::control::Secret;

    use super::{super::token::token_digest, *};

    fn token(text: &str) -> TokenDigest {
        token_digest(&Secret::new(text).unwrap())
    }

    #[test]
    fn verdicts_are_remembered_for_a_while() {
        let (mut verdicts, now) = (Verdicts::default(), Instant::now());
        let moment = Duration::from_millis(1);
        let accepted = Ok(ServiceAccount::default());
        let refused = Err(Refusal::Refused("bad".into()));
        verdicts.insert(token("good"), &accepted, now);
        verdicts.insert(token("bad"), &refused, now);
        verdicts.insert(token("unknown"), &Err(Refusal::NotReviewed("away".into())), now);
        for (name, verdict, life) in
            [("good", accepted, ACCEPTED_LIFE), ("bad", refused, FIRST_REFUSED_LIFE)]
        {
            assert_eq!(verdicts.get(&token(name), now + life - moment), Some(verdict));
            assert_eq!(verdicts.get(&token(name), now + life), None);
        }
        assert_eq!(verdicts.get(&token("unknown"), now), None, "it may be reviewed at once");
    }

    #[test]
    fn a_token_is_remembered_longer_each_time_it_is_refused() {
        let (mut verdicts, mut now) = (Verdicts::default(), Instant::now());
        let refused = Err(Refusal::Refused("not yet".into()));
        let mut refuse = |verdict: &Verdict| {
            verdicts.insert(token("x"), verdict, now);
            let begun = now;
            while verdicts.get(&token("x"), now).is_some() {
                now += Duration::from_secs(1);
            }
            (now - begun).as_secs()
        };
        assert_eq!([(); 6].map(|()| refuse(&refused)), [2, 4, 8, 16, 60, 60]);
        assert_eq!(refuse(&Ok(ServiceAccount::default())), 10);
        assert_eq!([(); 2].map(|()| refuse(&refused)), [2, 4]);
        assert_eq!(refuse(&Err(Refusal::Invalid("another account's".into()))), 60);
    }

    #[test]
    fn never_too_many_verdicts_are_remembered() {
        let (mut remembered, now) = (Remembered::default(), Instant::now());
        for number in 0..MAX_VERDICTS + 10 {
            remembered.insert(token(&number.to_string()), (), now, ACCEPTED_LIFE);
        }
        assert_eq!(remembered.0.len(), 16_384);
        remembered.insert(token("later"), (), now + ACCEPTED_LIFE, ACCEPTED_LIFE);
        assert_eq!(remembered.0.len(), 1, "expired ones make room");
    }
}
