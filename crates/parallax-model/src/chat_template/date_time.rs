//! A moment in UTC in the formats that templates ask for: C's `strftime` in English. No clock is read here.

const SECONDS_OF_A_DAY: u64 = 86_400;
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A date and the time of day, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    year: u64,
    /// From 1 on, as `day` and `day_of_year`.
    month: u64,
    day: u64,
    day_of_year: u64,
    /// From Sunday, 0, on.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl DateTime {
    /// The moment so many seconds after 1 January 1970, 00:00 UTC.
    ///
    /// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`: years that begin in March
    /// have the leap day at their end, in eras of 400 years that are all alike.
    pub fn from_unix_seconds(seconds: u64) -> Self {
        let (days, second) = (seconds / SECONDS_OF_A_DAY, seconds % SECONDS_OF_A_DAY);
        // 1 January 1970 is so many days behind 1 March 0.
        let (era, day) = ((days + 719_468) / 146_097, (days + 719_468) % 146_097);
        let year_of_era = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let since_march = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let months_since_march = (5 * since_march + 2) / 153;
        let is_next_year = months_since_march >= 10;
        let month = if is_next_year { months_since_march - 9 } else { months_since_march + 3 };
        let year = 400 * era + year_of_era + u64::from(is_next_year);
        let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        Self {
            year,
            month,
            day: since_march - (153 * months_since_march + 2) / 5 + 1,
            // 1 January is 306 days behind 1 March.
            day_of_year: if is_next_year { since_march - 305 } else { since_march + 60 + u64::from(is_leap) },
            // 1 January 1970 was a Thursday.
            weekday: (days + 4) % 7,
            hour: second / 3600,
            minute: second / 60 % 60,
            second: second % 60,
        }
    }

    /// The moment as `strftime` writes it: `%Y %y %m %B %b %d %e %j %A %a %H %I %p %M %S %%`. What else stands behind a `%`
    /// stays as it is.
    pub fn format(&self, format: &str) -> String {
        let mut text = String::with_capacity(format.len());
        let mut signs = format.chars();
        while let Some(sign) = signs.next() {
            if sign != '%' {
                text.push(sign);
                continue;
            }
            let code = signs.next();
            match code.and_then(|code| self.field(code)) {
                Some(field) => text.push_str(&field),
                None => text.extend(['%'].into_iter().chain(code)),
            }
        }
        text
    }

    fn field(&self, code: char) -> Option<String> {
        let (month, weekday) = (MONTHS[self.month as usize - 1], WEEKDAYS[self.weekday as usize]);
        Some(match code {
            'Y' => self.year.to_string(),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month),
            'B' => month.to_owned(),
            'b' => month[..3].to_owned(),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'j' => format!("{:03}", self.day_of_year),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'H' => format!("{:02}", self.hour),
            'I' => format!("{:02}", (self.hour + 11) % 12 + 1),
            'p' => ["AM", "PM"][usize::from(self.hour >= 12)].to_owned(),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::DateTime;

    /// Python 3: `datetime.fromtimestamp(s, timezone.utc).strftime(...)`.
    #[test]
    fn moments_are_written_as_python_writes_them() {
        let format = "%Y-%m-%d|%A %a %e %B %b %y|%j|%H:%M:%S|%I %p|100%%";
        for (seconds, expected) in [
            (0, "1970-01-01|Thursday Thu  1 January Jan 70|001|00:00:00|12 AM|100%"),
            (951_825_599, "2000-02-29|Tuesday Tue 29 February Feb 00|060|11:59:59|11 AM|100%"),
            (1_735_689_599, "2024-12-31|Tuesday Tue 31 December Dec 24|366|23:59:59|11 PM|100%"),
            (1_795_305_600, "2026-11-22|Sunday Sun 22 November Nov 26|326|00:00:00|12 AM|100%"),
            (1_795_349_045, "2026-11-22|Sunday Sun 22 November Nov 26|326|12:04:05|12 PM|100%"),
            (4_107_542_400, "2100-03-01|Monday Mon  1 March Mar 00|060|00:00:00|12 AM|100%"),
        ] {
            assert_eq!(DateTime::from_unix_seconds(seconds).format(format), expected);
        }
    }

    #[test]
    fn what_is_no_field_stays_as_it_is() {
        let moment = DateTime::from_unix_seconds(0);
        for (format, expected) in
            [("", ""), ("year", "year"), ("%é%Q%-d%", "%é%Q%-d%"), ("%%Y %Y", "%Y 1970")]
        {
            assert_eq!(moment.format(format), expected);
        }
        // The clock of a machine may say anything.
        assert!(!DateTime::from_unix_seconds(u64::MAX).format("%Y %B %A").is_empty());
    }
}
