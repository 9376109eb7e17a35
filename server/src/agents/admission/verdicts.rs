//! What was found out about tokens lately.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::{Refusal, ServiceAccount, token::TokenDigest};

/// Time for which a token that was accepted is not reviewed again. An agent that looks for a
/// missing server connects to those that it has many times within a few seconds.
pub(super) const ACCEPTED_LIFE: Duration = Duration::from_secs(10);
/// Time for which a token that was refused is not reviewed again.
pub(super) const REFUSED_LIFE: Duration = Duration::from_secs(60);
/// Maximum number of tokens that are remembered as accepted, and again as refused.
const MAX_VERDICTS: usize = 16 * 1024;

/// What was found out about one token.
pub(super) type Verdict = Result<ServiceAccount, Refusal>;

/// What was found out lately, by token.
#[derive(Debug, Default)]
pub(super) struct Verdicts {
    accepted: Remembered<ServiceAccount>,
    refused: Remembered<Refusal>,
}

impl Verdicts {
    /// The verdict about a token, if it is remembered.
    pub(super) fn get(&self, token: &TokenDigest, now: Instant) -> Option<Verdict> {
        let accepted = self.accepted.get(token, now).map(Ok);
        accepted.or_else(|| self.refused.get(token, now).map(Err))
    }

    /// Remembers a verdict. A token that could not be reviewed has none.
    pub(super) fn insert(&mut self, token: TokenDigest, verdict: &Verdict, now: Instant) {
        match verdict {
            Ok(account) => self.accepted.insert(token, account.clone(), now, ACCEPTED_LIFE),
            Err(Refusal::NotReviewed(_)) => {}
            Err(refusal) => self.refused.insert(token, refusal.clone(), now, REFUSED_LIFE),
        }
    }
}

/// Values by token, and until when they hold.
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

    fn insert(&mut self, token: TokenDigest, value: T, now: Instant, life: Duration) {
        if self.0.len() >= MAX_VERDICTS {
            self.0.retain(|_, (_, until)| *until > now);
        }
        if self.0.len() < MAX_VERDICTS {
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
            [("good", accepted, ACCEPTED_LIFE), ("bad", refused, REFUSED_LIFE)]
        {
            assert_eq!(verdicts.get(&token(name), now + life - moment), Some(verdict));
            assert_eq!(verdicts.get(&token(name), now + life), None);
        }
        assert_eq!(verdicts.get(&token("unknown"), now), None, "it may be reviewed at once");
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
